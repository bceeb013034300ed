"""Importances: activation size for channels, block influence for layers, chance as the control.

Sources: Muralidharan et al. 2024, Minitron (arXiv:2407.14679) for activations, mean over the
sequence and L2 over the batch; Men et al. 2024, ShortGPT (arXiv:2403.03853) for block influence.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from trt_kd.pruning.base import Importance, Unit

if TYPE_CHECKING:
    from torch import Generator, Tensor


class Activation(Importance):
    r"""Size of a channel's activations: :math:`\sqrt{\sum_b (\frac1L \sum_t |x_{btc}|)^2}`."""

    kind: Literal["activation"] = "activation"
    units: ClassVar[frozenset[Unit]] = frozenset({"channels"})

    def contribution(self, *states: "Tensor") -> "Tensor":
        """Sum over sequences of the squared mean size: ``[B, L, C]`` to ``[C]`` float64."""
        (state_BLC,) = states
        mean_BC = state_BLC.detach().float().abs().mean(dim=1)
        return mean_BC.double().square().sum(dim=0)

    def scores(self, total: "Tensor", generator: "Generator") -> "Tensor":
        """Square root of the total."""
        return total.sqrt()


class BlockInfluence(Importance):
    """How far a layer, or a run of layers, turns the residual stream: 1 - cos(before, after)."""

    kind: Literal["block_influence"] = "block_influence"
    units: ClassVar[frozenset[Unit]] = frozenset({"layers"})

    def contribution(self, *states: "Tensor") -> "Tensor":
        """Sum over tokens: two ``[B, L, H]`` to ``[]`` float64."""
        from torch.nn.functional import cosine_similarity

        before_BLH, after_BLH = (state.detach().float() for state in states)
        return (1.0 - cosine_similarity(before_BLH, after_BLH, dim=-1)).double().sum()

    def scores(self, total: "Tensor", generator: "Generator") -> "Tensor":
        """The total itself: every run saw the same tokens."""
        return total


class Random(Importance):
    """Chance, seeded by the stage: the control every other importance has to beat."""

    kind: Literal["random"] = "random"
    units: ClassVar[frozenset[Unit]] = frozenset({"channels", "layers"})

    def contribution(self, *states: "Tensor") -> "Tensor":
        """Nothing; NaN activations are still reported because they stay NaN."""
        last = states[-1].detach().double()
        return 0.0 * (last.sum(dim=(0, 1)) if len(states) == 1 else last.sum())

    def scores(self, total: "Tensor", generator: "Generator") -> "Tensor":
        """Uniform numbers that depend on the generator alone."""
        import torch

        return torch.rand(total.shape, generator=generator, dtype=torch.float64)
