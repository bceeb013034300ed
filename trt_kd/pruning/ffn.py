"""Width of the MLPs.

Source: Muralidharan et al. 2024, Minitron (arXiv:2407.14679).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveInt
from typing_extensions import Self

from trt_kd.architectures.shape import ModelShape
from trt_kd.pruning.base import Axis, Site, Unit
from trt_kd.pruning.sizes import grid

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from trt_kd.architectures.base import Architecture


class FfnAxis(Axis):
    """Keep the best intermediate channels of every MLP, chosen layer by layer."""

    kind: Literal["ffn"] = "ffn"
    constraint: ClassVar[str] = "ffn_hidden_size"
    shape_field: ClassVar[str] = "ffn"
    unit: ClassVar[Unit] = "channels"
    size: PositiveInt | None = None
    """Intermediate channels per layer after pruning; open: solved from ``parameters_share``."""
    multiple_of: PositiveInt = 64
    """Tile of the matrix units and of block-wise quantization; off the grid saves no time."""

    @property
    def is_open(self) -> bool:
        """See the base class."""
        return self.size is None

    def target(self, shape: ModelShape) -> int:
        """See the base class."""
        return self.size or shape.ffn

    def legal(self, shape: ModelShape) -> list[int]:
        """See the base class."""
        return grid(shape.ffn, self.multiple_of)

    def resized(self, size: int) -> Self:
        """See the base class."""
        return self.model_copy(update={"size": size})

    def rehearsed(self) -> Self:
        """See the base class."""
        return self

    def sites(self, model: "PreTrainedModel", architecture: "Architecture") -> list[Site]:
        """Inputs of the down projections: what each channel contributes."""
        downs = [architecture.mlp(layer).down for layer in architecture.layers(model)]
        return [Site(down, "input") for down in downs]

    def keep(self, scores: "list[Tensor]", shape: ModelShape) -> "list[Tensor]":
        """The best channels of every layer by its own scores."""
        from trt_kd.pruning.slicing import best

        return [best(scores_C, self.target(shape)) for scores_C in scores]

    def cut(
        self,
        model: "PreTrainedModel",
        architecture: "Architecture",
        keep: "Sequence[Tensor]",
    ) -> None:
        """Drop rows of gate and up, and the matching columns of down."""
        from trt_kd.pruning.slicing import slice_linear

        for layer, keep_K in zip(architecture.layers(model), keep, strict=True):
            mlp = architecture.mlp(layer)
            slice_linear(mlp.gate, keep_K, 0)
            slice_linear(mlp.up, keep_K, 0)
            slice_linear(mlp.down, keep_K, 1)
        architecture.record_ffn(model, keep[0].numel())
