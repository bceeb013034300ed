"""Adaptive Kullback-Leibler distillation.

Source: Wu et al. 2024, AKL (arXiv:2404.02657); the temperature is not in the paper.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat

from trt_kd.losses.closed_form import ClosedForm, Form


class AdaptiveKL(ClosedForm):
    r"""Forward and reverse KL, mixed for each token by where teacher p and student q differ.

    :math:`\tau^2 \sum_t w_t D_{KL}(p_t \| q_t) + (1 - w_t) D_{KL}(q_t \| p_t)`. The weight
    :math:`w_t` is the part of :math:`\sum_v |p_{tv} - q_{tv}|` that lies in the teacher's head, its
    likeliest tokens of mass ``head`` together: forward KL is quick to mend the head, reverse KL the
    tail. As in the authors' code the gradient holds the weights constant.
    """

    detached_weights: ClassVar[bool] = True

    kind: Literal["adaptive_kl"] = "adaptive_kl"
    """Name in the registry."""
    head: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Mass of the teacher's head; its likeliest token is always in it."""
    temperature: PositiveFloat = 1.0
    """Softens both distributions; the loss is scaled by its square to keep gradient size."""

    def form(self) -> Form:
        """See the base class."""
        from trt_kd.losses.divergences import adaptive_kl, adaptive_kl_gradient

        options = {"head": self.head, "temperature": self.temperature}
        return Form(adaptive_kl, adaptive_kl_gradient, options)
