"""Generalised Jensen-Shannon distillation.

Source: Agarwal et al. 2024, GKD (arXiv:2306.13649), equation 1; teacher P, student Q.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat

from trt_kd.losses.base import KDLoss

if TYPE_CHECKING:
    from torch import Tensor


class JensenShannon(KDLoss):
    r"""Bounded loss between forward (beta to 0) and reverse (beta to 1) KL.

    :math:`\tau^2 \sum_t \beta D_{KL}(p_t \| m_t) + (1 - \beta) D_{KL}(q_t \| m_t)` with
    :math:`m = \beta p + (1 - \beta) q`. As in the paper it is not divided by beta (1 - beta), so
    its gradient fades towards both ends.
    """

    f_divergence: ClassVar[bool] = True

    kind: Literal["jsd"] = "jsd"
    """Name in the registry."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the teacher in the mixture, strictly between 0 and 1."""
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
        from trt_kd.losses.maths import jensen_shannon

        return jensen_shannon(
            student_TV, teacher_TV, mask_T, beta=self.beta, temperature=self.temperature
        )

    def value_and_gradient(
        self,
        student_TV: "Tensor",
        teacher_TV: "Tensor",
        mask_T: "Tensor",
        labels_T: "Tensor | None" = None,
    ) -> "tuple[Tensor, Tensor]":
        """See the base class; the gradient in closed form."""
        from trt_kd.losses.maths import jensen_shannon_gradient

        return jensen_shannon_gradient(
            student_TV, teacher_TV, mask_T, beta=self.beta, temperature=self.temperature
        )
