"""Forward and reverse Kullback-Leibler distillation.

Sources: Hinton et al. 2015 (arXiv:1503.02531) for the temperature and its square;
Gu et al. 2024, MiniLLM (arXiv:2306.08543) for the reverse direction.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import PositiveFloat

from trt_kd.losses.base import KDLoss

if TYPE_CHECKING:
    from torch import Tensor


class ForwardKL(KDLoss):
    r"""Mode-covering loss :math:`\tau^2 \sum_t D_{KL}(p_t \| q_t)`, teacher p, student q."""

    kind: Literal["forward_kl"] = "forward_kl"
    """Name in the registry."""
    temperature: PositiveFloat = 1.0
    """Softens both distributions; the loss is scaled by its square to keep gradient size."""

    def __call__(self, student_TV: "Tensor", teacher_TV: "Tensor", mask_T: "Tensor") -> "Tensor":
        """See the base class."""
        from trt_kd.losses.maths import forward_kl

        return forward_kl(student_TV, teacher_TV, mask_T, self.temperature)

    def value_and_gradient(
        self, student_TV: "Tensor", teacher_TV: "Tensor", mask_T: "Tensor"
    ) -> "tuple[Tensor, Tensor]":
        """See the base class; the gradient in closed form."""
        from trt_kd.losses.maths import forward_kl_gradient

        return forward_kl_gradient(student_TV, teacher_TV, mask_T, self.temperature)


class ReverseKL(KDLoss):
    r"""Mode-seeking loss :math:`\tau^2 \sum_t D_{KL}(q_t \| p_t)`, teacher p, student q."""

    kind: Literal["reverse_kl"] = "reverse_kl"
    """Name in the registry."""
    temperature: PositiveFloat = 1.0
    """Softens both distributions; the loss is scaled by its square to keep gradient size."""

    def __call__(self, student_TV: "Tensor", teacher_TV: "Tensor", mask_T: "Tensor") -> "Tensor":
        """See the base class."""
        from trt_kd.losses.maths import reverse_kl

        return reverse_kl(student_TV, teacher_TV, mask_T, self.temperature)
