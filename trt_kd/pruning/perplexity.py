"""Perplexity importance: how much worse the model predicts without a layer, or a run of them.

Sources: Men et al. 2024, ShortGPT (arXiv:2403.03853) and Muralidharan et al. 2024, Minitron
(arXiv:2407.14679), which compare it with block influence. Here in nats: the rise of the loss is the
logarithm of the ratio of perplexities, and ranks the same.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveInt

from trt_kd.pruning.base import Evidence, Importance, Unit

if TYPE_CHECKING:
    from torch import Generator, Tensor


class Perplexity(Importance):
    """Rise of the mean next-token loss, in nats, when a layer or a run of layers is skipped."""

    kind: Literal["perplexity"] = "perplexity"
    units: ClassVar[frozenset[Unit]] = frozenset({"layers"})
    evidence: ClassVar[Evidence] = "losses"
    blocks: PositiveInt = 4
    """Calibration sequences to measure on at most: each costs half a forward pass per layer."""

    def contribution(self, *states: "Tensor") -> "Tensor":
        """Loss without the run less the loss of the whole model, both ``[]`` in nats per token."""
        whole, without = states
        return without.double() - whole.double()

    def scores(self, total: "Tensor", generator: "Generator") -> "Tensor":
        """The total itself."""
        return total

    def most_blocks(self) -> int | None:
        """See ``blocks``."""
        return self.blocks
