"""Alpha-beta distillation.

Sources: Cichocki, Cruces and Amari 2011 (doi:10.3390/e13010134) for the divergence; Wang et al.
2025, ABKD (arXiv:2505.04560) for distillation. Teacher p, student q.
"""

from typing import Literal

from pydantic import PositiveFloat

from trt_kd.losses.closed_form import ClosedForm, Form


class AlphaBeta(ClosedForm):
    r"""Two exponents between forward KL (1, 0) and reverse KL (0, 1).

    :math:`\frac{\tau^2}{\alpha \beta} \sum_t \sum_v \frac{\alpha}{\alpha + \beta} p^{\alpha +
    \beta} + \frac{\beta}{\alpha + \beta} q^{\alpha + \beta} - p^\alpha q^\beta`. A smaller alpha
    looks at ratios of probabilities, a larger one at differences; a larger beta looks more at the
    tokens that the student is sure of.
    """

    kind: Literal["alpha_beta"] = "alpha_beta"
    """Name in the registry."""
    alpha: PositiveFloat = 0.2
    """Exponent of the teacher."""
    beta: PositiveFloat = 0.7
    """Exponent of the student."""
    temperature: PositiveFloat = 1.0
    """Softens both distributions; the loss is scaled by its square to keep gradient size."""

    def form(self) -> Form:
        """See the base class."""
        from trt_kd.losses.divergences import alpha_beta, alpha_beta_gradient

        options = {"exponents": (self.alpha, self.beta), "temperature": self.temperature}
        return Form(alpha_beta, alpha_beta_gradient, options)
