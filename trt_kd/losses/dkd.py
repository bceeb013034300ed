"""Decoupled knowledge distillation.

Source: Zhao et al. 2022, DKD (arXiv:2203.08679).
"""

from typing import ClassVar, Literal

from pydantic import PositiveFloat

from trt_kd.losses.closed_form import ClosedForm, Form


class DecoupledKD(ClosedForm):
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

    def form(self) -> Form:
        """See the base class."""
        from trt_kd.losses.labelled import decoupled_kl, decoupled_kl_gradient

        options = {"weights": (self.alpha, self.beta), "temperature": self.temperature}
        return Form(decoupled_kl, decoupled_kl_gradient, options)
