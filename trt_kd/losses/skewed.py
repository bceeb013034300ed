"""Skewed Kullback-Leibler distillation.

Source: Ko et al. 2024, DistiLLM (arXiv:2402.03898), with its alpha of 0.1; the temperature is
not in the paper. Teacher p, student q.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat

from trt_kd.losses.closed_form import ClosedForm, Form


class SkewedForwardKL(ClosedForm):
    r"""Forward KL to a student that is helped by a little of the teacher.

    :math:`\tau^2 \sum_t D_{KL}(p_t \| \alpha p_t + (1 - \alpha) q_t)`: at most
    :math:`-\log \alpha` per token, so that no token the student misses can outweigh the batch.
    """

    f_divergence: ClassVar[bool] = True

    kind: Literal["skewed_forward_kl"] = "skewed_forward_kl"
    """Name in the registry."""
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the teacher in the mixture, above 0 (which would be forward KL) and below 1."""
    temperature: PositiveFloat = 1.0
    """Softens both distributions; the loss is scaled by its square to keep gradient size."""

    def form(self) -> Form:
        """See the base class."""
        from trt_kd.losses.divergences import skewed_forward_kl, skewed_forward_kl_gradient

        options = {"alpha": self.alpha, "temperature": self.temperature}
        return Form(skewed_forward_kl, skewed_forward_kl_gradient, options)


class SkewedReverseKL(ClosedForm):
    r"""Reverse KL to a teacher that is smoothed by a little of the student.

    :math:`\tau^2 \sum_t D_{KL}(q_t \| (1 - \alpha) p_t + \alpha q_t)`: at most
    :math:`-\log \alpha` per token, which keeps text that the student wrote itself in bounds.
    """

    f_divergence: ClassVar[bool] = True

    kind: Literal["skewed_reverse_kl"] = "skewed_reverse_kl"
    """Name in the registry."""
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the student in the mixture, above 0 (which would be reverse KL) and below 1."""
    temperature: PositiveFloat = 1.0
    """Softens both distributions; the loss is scaled by its square to keep gradient size."""

    def form(self) -> Form:
        """See the base class."""
        from trt_kd.losses.divergences import skewed_reverse_kl, skewed_reverse_kl_gradient

        options = {"alpha": self.alpha, "temperature": self.temperature}
        return Form(skewed_reverse_kl, skewed_reverse_kl_gradient, options)
