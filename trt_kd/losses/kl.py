"""Forward, reverse and symmetric Kullback-Leibler distillation.

Sources: Hinton et al. 2015 (arXiv:1503.02531) for the temperature and its square;
Gu et al. 2024, MiniLLM (arXiv:2306.08543) for the reverse direction; Jeffreys 1946
(doi:10.1098/rspa.1946.0056) for the sum of both, of which the mean is half.
"""

from typing import ClassVar, Literal

from pydantic import PositiveFloat

from trt_kd.losses.closed_form import ClosedForm, Form


class ForwardKL(ClosedForm):
    r"""Mode-covering loss :math:`\tau^2 \sum_t D_{KL}(p_t \| q_t)`, teacher p, student q."""

    f_divergence: ClassVar[bool] = True
    reads_draws: ClassVar[bool] = True

    kind: Literal["forward_kl"] = "forward_kl"
    """Name in the registry."""
    temperature: PositiveFloat = 1.0
    """Softens both distributions; the loss is scaled by its square to keep gradient size."""

    def form(self) -> Form:
        """See the base class."""
        from trt_kd.losses.maths import forward_kl, forward_kl_gradient

        options = {"temperature": self.temperature}
        return Form(forward_kl, forward_kl_gradient, options)


class ReverseKL(ClosedForm):
    r"""Mode-seeking loss :math:`\tau^2 \sum_t D_{KL}(q_t \| p_t)`, teacher p, student q."""

    f_divergence: ClassVar[bool] = True

    kind: Literal["reverse_kl"] = "reverse_kl"
    """Name in the registry."""
    temperature: PositiveFloat = 1.0
    """Softens both distributions; the loss is scaled by its square to keep gradient size."""

    def form(self) -> Form:
        """See the base class."""
        from trt_kd.losses.maths import reverse_kl, reverse_kl_gradient

        options = {"temperature": self.temperature}
        return Form(reverse_kl, reverse_kl_gradient, options)


class SymmetricKL(ClosedForm):
    r"""Mean of forward and reverse KL, half of Jeffreys' divergence.

    :math:`\frac{\tau^2}{2} \sum_t D_{KL}(p_t \| q_t) + D_{KL}(q_t \| p_t)`, teacher p, student q.
    The mean and not the sum, so that near agreement it is as large as either direction.
    """

    f_divergence: ClassVar[bool] = True

    kind: Literal["symmetric_kl"] = "symmetric_kl"
    """Name in the registry."""
    temperature: PositiveFloat = 1.0
    """Softens both distributions; the loss is scaled by its square to keep gradient size."""

    def form(self) -> Form:
        """See the base class."""
        from trt_kd.losses.maths import symmetric_kl, symmetric_kl_gradient

        options = {"temperature": self.temperature}
        return Form(symmetric_kl, symmetric_kl_gradient, options)
