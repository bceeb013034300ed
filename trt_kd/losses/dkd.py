"""Decoupled knowledge distillation.

Source: Zhao et al. 2022, DKD (arXiv:2203.08679).
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveFloat

from trt_kd.losses.base import KDLoss

if TYPE_CHECKING:
    from torch import Tensor


class DecoupledKD(KDLoss):
    r"""Forward KL in two parts: the true next token against all others, and the others.

    :math:`\tau^2 \sum_t \alpha D_{KL}(b(p_t) \| b(q_t)) + \beta D_{KL}(\hat p_t \| \hat q_t)` with
    b = (label, all others) and the hats the distributions among the others; teacher p, student q.
    Forward KL is alpha 1 and, token by token, beta 1 - p(label): the surer the teacher is, the less
    forward KL tells about the other tokens.
    """

    needs_labels: ClassVar[bool] = True

    kind: Literal["dkd"] = "dkd"
    """Name in the registry."""
    alpha: PositiveFloat = 1.0
    """Weight of the label's part."""
    beta: PositiveFloat = 1.0
    """Weight of the others' part; the paper takes 0.5 to 8, more for a surer teacher."""
    temperature: PositiveFloat = 1.0
    """Softens both distributions; the loss is scaled by its square to keep gradient size."""

    def __call__(
        self,
        student_TV: "Tensor",
        teacher_TV: "Tensor",
        mask_T: "Tensor",
        labels_T: "Tensor | None" = None,
    ) -> "Tensor":
        """See the base class."""
        from trt_kd.losses.labelled import decoupled_kl, true_tokens

        labels_T = true_tokens(labels_T, self.kind)
        return decoupled_kl(
            student_TV,
            teacher_TV,
            mask_T,
            labels_T,
            weights=(self.alpha, self.beta),
            temperature=self.temperature,
        )

    def value_and_gradient(
        self,
        student_TV: "Tensor",
        teacher_TV: "Tensor",
        mask_T: "Tensor",
        labels_T: "Tensor | None" = None,
    ) -> "tuple[Tensor, Tensor]":
        """See the base class; the gradient in closed form."""
        from trt_kd.losses.labelled import decoupled_kl_gradient, true_tokens

        labels_T = true_tokens(labels_T, self.kind)
        return decoupled_kl_gradient(
            student_TV,
            teacher_TV,
            mask_T,
            labels_T,
            weights=(self.alpha, self.beta),
            temperature=self.temperature,
        )
