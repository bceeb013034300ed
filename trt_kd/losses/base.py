"""What a distillation loss on logits is.

Shape suffixes: T tokens, V vocabulary.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from trt_kd.config import Plugin

if TYPE_CHECKING:
    from torch import Tensor

    from trt_kd.losses.top_k import TopK


class KDLoss(Plugin, ABC):
    """How far the student's next-token distributions are from the teacher's.

    Every member is zero where the two agree, positive elsewhere, and a sum over valid tokens, so
    that it adds up over chunks and micro-batches. What else holds, or does not, a member declares
    in the class variables below, and the tests of the family read them.
    """

    needs_labels: ClassVar[bool] = False
    """Whether the true next tokens take part in the loss."""
    zero_at_agreement: ClassVar[bool] = True
    """False where the student is to go beyond the teacher by design."""
    smooth: ClassVar[bool] = True
    """False where the gradient jumps; a subgradient is returned there."""
    detached_weights: ClassVar[bool] = False
    """Whether weights that follow the student are held constant by the gradient."""
    any_vocabulary: ClassVar[bool] = False
    """Whether the two may have different vocabularies; else unequal shapes are refused."""
    f_divergence: ClassVar[bool] = False
    """Whether merging tokens never raises the loss, so that top-k gives a lower bound of it."""
    reads_draws: ClassVar[bool] = False
    """Whether tokens drawn from the teacher's tail count: without bias the loss is the dense one
    then, and no bound of it. Else the tail is one bucket."""

    @abstractmethod
    def __call__(
        self,
        student_TV: "Tensor",
        teacher_TV: "Tensor",
        mask_T: "Tensor",
        labels_T: "Tensor | None" = None,
    ) -> "Tensor":
        """Sum the loss over the tokens that ``mask_T`` marks as valid.

        Args:
            student_TV: logits ``[T, V]`` of any float dtype.
            teacher_TV: logits ``[T, V]`` of any float dtype; no gradient flows into them.
            mask_T: bool ``[T]``; a row that is False may hold anything, NaN included.
            labels_T: true next tokens, int64 ``[T]``; only for members with ``needs_labels``.

        Returns:
            Scalar in nats, float32 (float64 for float64 logits).

        Raises:
            ValueError: if the two logits differ in shape, or labels are needed and missing.
        """

    def value_and_gradient(
        self,
        student_TV: "Tensor",
        teacher_TV: "Tensor",
        mask_T: "Tensor",
        labels_T: "Tensor | None" = None,
    ) -> "tuple[Tensor, Tensor]":
        """Return the loss and its gradient with respect to ``student_TV``.

        A member with a gradient in closed form overrides this to save passes over the vocabulary.
        """
        import torch

        with torch.enable_grad():
            student = student_TV.detach().requires_grad_()
            value = self(student, teacher_TV, mask_T, labels_T)
            (gradient_TV,) = torch.autograd.grad(value, student)
        return value.detach(), gradient_TV

    def top_k_problem(self) -> str | None:
        """Why the loss cannot be had from top-k log-probabilities; None where it can.

        A temperature is one: the tail's mass at another temperature is not known from its mass.
        """
        temperature: float = getattr(self, "temperature", 1.0)
        if temperature == 1.0:
            return None
        return f"{self.kind} at temperature {temperature:g} needs the teacher's whole distribution"

    def top_k_value_and_gradient(
        self,
        student_TV: "Tensor",
        top: "TopK",
        mask_T: "Tensor",
        labels_T: "Tensor | None" = None,
    ) -> "tuple[Tensor, Tensor]":
        """Return the loss between k + 1 buckets, the tail being one, and its gradient.

        With draws from the tail, what they tell is added where ``reads_draws`` says so.

        Args:
            student_TV: logits ``[T, V]`` of any float dtype.
            top: the teacher's rows.
            mask_T: bool ``[T]``; a row that is False may hold anything, NaN included.
            labels_T: true next tokens, int64 ``[T]``; one outside of the top k is the tail.

        Raises:
            ValueError: if ``top_k_problem`` names one, or the rows differ in number.
        """
        from trt_kd.losses.top_k import bucketed

        if problem := self.top_k_problem():
            raise ValueError(problem)
        return bucketed(self, student_TV, top, mask_T, labels_T)
