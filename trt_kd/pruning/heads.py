"""Query heads of each group, and whole groups that share keys and values.

Source: Muralidharan et al. 2024, Minitron (arXiv:2407.14679), for the score of a head, the size of
its output before the output projection. Heads go group by group, so that every group keeps the
same number and grouped-query kernels still run; ``mcore_minitron`` keeps all groups.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveInt

from trt_kd.architectures.shape import ModelShape
from trt_kd.pruning.base import Place, Site, WidthAxis

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from trt_kd.architectures.base import Architecture


class HeadsAxis(WidthAxis):
    """Keep the best query heads of every group; ``size`` counts heads per group."""

    kind: Literal["heads"] = "heads"
    constraint: ClassVar[str] = "num_attention_heads"
    shape_field: ClassVar[str] = "heads"
    multiple_of: PositiveInt = 1
    """Heads per group come in multiples of this."""

    def read(self, shape: ModelShape) -> int:
        """Query heads per group."""
        return shape.heads // shape.kv_heads

    def write(self, shape: ModelShape, size: int) -> ModelShape:
        """See the base class."""
        return shape.with_sizes(heads=shape.kv_heads * size)

    def places(self, model: "PreTrainedModel", architecture: "Architecture") -> list[Place]:
        """One per attention block: what each head brings into the output projection."""
        from trt_kd.architectures.base import columns

        found = []
        for index, layer in enumerate(architecture.layers(model)):
            block = architecture.attention(layer)
            column = columns(block.o, block.heads)
            site = Site(block.o, "input", column.width)
            found.append(Place((site,), (*block.query, column), index, block.o))
        return found

    def keep(self, scores: "list[Tensor]", shape: ModelShape) -> "list[Tensor]":
        """The best heads of every group, counted through the whole block."""
        import torch

        from trt_kd.pruning.slicing import best

        group = self.read(shape)
        chosen = []
        for scores_N in scores:
            groups = enumerate(scores_N.view(-1, group))
            kept = [best(part, self.target(shape)) + n * group for n, part in groups]
            chosen.append(torch.cat(kept))
        return chosen


class KvHeadsAxis(WidthAxis):
    """Keep the best groups of heads with their keys and values: a smaller cache."""

    kind: Literal["kv_heads"] = "kv_heads"
    constraint: ClassVar[str] = "num_query_groups"
    shape_field: ClassVar[str] = "kv_heads"
    multiple_of: PositiveInt = 1
    """Groups come in multiples of this."""

    def write(self, shape: ModelShape, size: int) -> ModelShape:
        """See the base class."""
        return shape.with_sizes(kv_heads=size, heads=size * (shape.heads // shape.kv_heads))

    def places(self, model: "PreTrainedModel", architecture: "Architecture") -> list[Place]:
        """One per attention block: what each group brings into the output projection."""
        from trt_kd.architectures.base import columns

        found = []
        for index, layer in enumerate(architecture.layers(model)):
            block = architecture.attention(layer)
            group = block.heads // block.kv_heads
            column = columns(block.o, block.kv_heads)
            query = (
                replace(entry, units=block.kv_heads, width=entry.width * group)
                for entry in block.query
            )
            site = Site(block.o, "input", column.width)
            slices = (*query, *block.key_value, column)
            found.append(Place((site,), slices, index, block.o))
        return found
