"""Importances: activation size for channels, block influence for layers, chance as the control.

Sources: Muralidharan et al. 2024, Minitron (arXiv:2407.14679) for activations and how they are
aggregated, mean over the sequence and L2 over the batch being its best; Men et al. 2024, ShortGPT
(arXiv:2403.03853) for block influence.

Shapes: B sequences, L tokens, C channels, H hidden.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from trt_kd.pruning.base import Importance, Unit

if TYPE_CHECKING:
    from torch import Generator, Tensor

_SMALLEST_NORM = 1e-8


class Activation(Importance):
    r"""Size of a channel's activations: :math:`\sqrt{\sum_b (\frac1L \sum_t |x_{btc}|)^2}`.

    That is the default, mean over the sequence and L2 over the batch.
    """

    kind: Literal["activation"] = "activation"
    units: ClassVar[frozenset[Unit]] = frozenset({"channels"})
    over_sequence: Literal["mean", "l2", "max"] = "mean"
    """How the sizes at all tokens of a sequence become one: mean, root of the sum of squares, or
    largest."""
    over_batch: Literal["l2", "mean", "max"] = "l2"
    """How the sequences of the whole calibration text become one. A mean is left as a sum, which
    ranks the same: all units see the same number of sequences."""

    def contribution(self, *states: "Tensor") -> "Tensor":
        """One size per sequence, then what they add: ``[B, L, C]`` to ``[C]`` float64."""
        (state_BLC,) = states
        size_BC = self._sequences(state_BLC.detach().float()).double()
        if self.over_batch == "max":
            return size_BC.amax(dim=0)
        return (size_BC.square() if self.over_batch == "l2" else size_BC).sum(dim=0)

    def combined(self, total: "Tensor", contribution: "Tensor") -> "Tensor":
        """Sum, or the larger of both."""
        return total.maximum(contribution) if self.over_batch == "max" else total + contribution

    def scores(self, total: "Tensor", generator: "Generator") -> "Tensor":
        """The total, of squares its root."""
        return total.sqrt() if self.over_batch == "l2" else total

    def _sequences(self, state_BLC: "Tensor") -> "Tensor":
        if self.over_sequence == "l2":
            return state_BLC.square().sum(dim=1).sqrt()
        size_BLC = state_BLC.abs()
        if self.over_sequence == "max":
            return size_BLC.amax(dim=1)
        # On CPUs a mean takes more than twice the time of a sum.
        return size_BLC.sum(dim=1) / state_BLC.shape[1]


class BlockInfluence(Importance):
    """How far a layer, or a run of layers, turns the residual stream: 1 - cos(before, after)."""

    kind: Literal["block_influence"] = "block_influence"
    units: ClassVar[frozenset[Unit]] = frozenset({"layers"})

    def contribution(self, *states: "Tensor") -> "Tensor":
        """Sum over tokens: two ``[B, L, H]`` to ``[]`` float64."""
        from torch.linalg import vecdot, vector_norm

        before_BLH, after_BLH = (state.detach().float() for state in states)
        # Half the time of torch's cosine_similarity, which divides before it multiplies.
        dot_BL = vecdot(before_BLH, after_BLH)
        norms = (vector_norm(each, dim=-1) for each in (before_BLH, after_BLH))
        before_BL, after_BL = (norm_BL.clamp(min=_SMALLEST_NORM) for norm_BL in norms)
        turned_BL: Tensor = 1.0 - dot_BL / before_BL / after_BL
        return turned_BL.double().sum()

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
