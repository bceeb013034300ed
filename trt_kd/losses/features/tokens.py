"""Losses between the features of one token.

Sources: Romero et al. 2015, FitNets (arXiv:1412.6550) for the hint; Jiao et al. 2020, TinyBERT
(arXiv:1909.10351) for the mean squared error of hidden states; Sanh et al. 2019, DistilBERT
(arXiv:1910.01108) for the cosine; Miles and Mikolajczyk 2024 (arXiv:2303.11098) for LogSum, which
VkD (Miles et al. 2024, arXiv:2403.06213) builds upon.
"""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat

from trt_kd.losses.features.base import TokenLoss

if TYPE_CHECKING:
    from torch import Tensor


class MeanSquaredError(TokenLoss):
    r"""Mean squared difference of the channels, :math:`\sum_t \frac1D \|s_t - t_t\|^2`."""

    kind: Literal["mse"] = "mse"
    """Name in the registry."""

    def tokens(self, student_TD: "Tensor", teacher_TD: "Tensor") -> "Tensor":
        """See the base class."""
        return (student_TD - teacher_TD).square().mean(-1)


class Hint(TokenLoss):
    r"""FitNets' hint, :math:`\frac12 \sum_t \|s_t - t_t\|^2`, made to be learnt before the rest."""

    kind: Literal["hint"] = "hint"
    """Name in the registry."""

    def tokens(self, student_TD: "Tensor", teacher_TD: "Tensor") -> "Tensor":
        """See the base class."""
        return 0.5 * (student_TD - teacher_TD).square().sum(-1)


class Cosine(TokenLoss):
    r"""One less the cosine of the angle between the two, :math:`\sum_t 1 - \cos(s_t, t_t)`."""

    kind: Literal["cosine"] = "cosine"
    """Name in the registry."""

    def tokens(self, student_TD: "Tensor", teacher_TD: "Tensor") -> "Tensor":
        """See the base class."""
        from torch.nn import functional

        return 1 - functional.cosine_similarity(student_TD, teacher_TD, dim=-1)


class LogSum(TokenLoss):
    r"""Logarithm of the summed powers, a soft maximum over the channels' differences.

    :math:`\sum_t \log(1 + \frac1\epsilon \sum_d |s_{td} - t_{td}|^\alpha)`. The paper takes one
    logarithm over the whole batch and no floor :math:`\epsilon`; one for every token adds up over
    micro-batches, and the floor makes it zero at agreement instead of minus infinity.
    """

    kind: Literal["logsum"] = "logsum"
    """Name in the registry."""
    alpha: Annotated[float, Field(ge=2)] = 4.0
    """Power; the paper finds 4 to 5 best."""
    floor: PositiveFloat = 1e-4
    """Sum of powers below which the loss flattens."""

    def tokens(self, student_TD: "Tensor", teacher_TD: "Tensor") -> "Tensor":
        """See the base class."""
        powers_T = (student_TD - teacher_TD).abs().pow(self.alpha).sum(-1)
        return (powers_T / self.floor).log1p()
