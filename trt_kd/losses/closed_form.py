"""Losses whose gradient is known in closed form: a pair of functions and their options.

Shape suffixes: T tokens, V vocabulary.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from trt_kd.losses.base import KDLoss

if TYPE_CHECKING:
    from torch import Tensor


class Form(NamedTuple):
    """Both functions take student, teacher, mask, the labels of a loss that needs them, options."""

    value: "Callable[..., Tensor]"
    """Sum of the loss over valid tokens."""
    value_and_gradient: "Callable[..., tuple[Tensor, Tensor]]"
    """The same and its gradient by the student's logits."""
    options: dict[str, Any]
    """Keyword arguments of both."""


def _by(function: str) -> Any:
    """The method that calls ``function`` of the form; it is called as ``KDLoss`` says."""

    def call(
        self: "ClosedForm",
        student_TV: "Tensor",
        teacher_TV: "Tensor",
        mask_T: "Tensor",
        labels_T: "Tensor | None" = None,
    ) -> Any:
        form = self.form()
        rows = (student_TV, teacher_TV, mask_T, *self._labels(labels_T))
        return getattr(form, function)(*rows, **form.options)

    return call


class ClosedForm(KDLoss):
    """A loss that is a pair of functions: its value, and its value with the gradient."""

    __call__ = _by("value")
    value_and_gradient: ClassVar[Any] = _by("value_and_gradient")

    @abstractmethod
    def form(self) -> Form:
        """The functions, imported only when they are called, and this loss's options for them."""

    def _labels(self, labels_T: "Tensor | None") -> "tuple[Tensor, ...]":
        from trt_kd.losses.labelled import true_tokens

        return (true_tokens(labels_T, self.kind),) if self.needs_labels else ()
