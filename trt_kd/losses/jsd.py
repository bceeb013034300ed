"""Generalised Jensen-Shannon distillation.

Source: Agarwal et al. 2024, GKD (arXiv:2306.13649), equation 1; teacher P, student Q.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat

from trt_kd.losses.closed_form import ClosedForm, Form


class JensenShannon(ClosedForm):
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

    def form(self) -> Form:
        """See the base class."""
        from trt_kd.losses.maths import jensen_shannon, jensen_shannon_gradient

        options = {"beta": self.beta, "temperature": self.temperature}
        return Form(jensen_shannon, jensen_shannon_gradient, options)
