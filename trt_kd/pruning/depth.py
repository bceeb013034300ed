"""Number of layers.

Sources: Men et al. 2024, ShortGPT (arXiv:2403.03853) for single layers by block influence;
Gromov et al. 2024 (arXiv:2403.17887) for a contiguous run chosen by its two ends.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializeAsAny,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from trt_kd.architectures.shape import ModelShape
from trt_kd.config import build_plugin
from trt_kd.errors import ConfigError
from trt_kd.pruning import IMPORTANCE
from trt_kd.pruning.base import Axis, Importance, Unit
from trt_kd.pruning.importance import BlockInfluence

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from trt_kd.architectures.base import Architecture


class DepthAxis(Axis):
    """Drop whole layers; the first and the last stay as long as others are left to drop."""

    kind: Literal["depth"] = "depth"
    constraint: ClassVar[str] = "num_layers"
    shape_field: ClassVar[str] = "layers"
    unit: ClassVar[Unit] = "layers"
    layers: PositiveInt | None = None
    """Layers after pruning; open, and no ``drop``: solved from a budget."""
    drop: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] | None = None
    """Layers to drop by their numbers from 0, instead of by importance."""
    contiguous: bool = False
    """Drop one run of neighbouring layers, the one whose two ends differ least."""
    importance: Annotated[
        SerializeAsAny[Importance], BeforeValidator(partial(build_plugin, IMPORTANCE))
    ] = BlockInfluence()
    """How layers are ranked; not asked when ``drop`` names them."""

    @field_validator("importance")
    @classmethod
    def _scores_layers(cls, value: Importance) -> Importance:
        if "layers" not in value.units:
            raise ValueError(f"importance {value.kind!r} does not rank layers")
        return value

    @field_validator("drop")
    @classmethod
    def _ascending(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("a layer stands twice")
        return value if value is None else tuple(sorted(value))

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.drop is not None and (self.layers is not None or self.contiguous):
            raise ValueError("'drop' settles the layers: leave out 'layers' and 'contiguous'")
        return self

    @property
    def is_open(self) -> bool:
        """See the base class."""
        return self.layers is None and self.drop is None

    def target(self, shape: ModelShape) -> int:
        """See the base class.

        Raises:
            ConfigError: if a layer to drop does not exist, or none would be left.
        """
        if self.drop is None:
            return self.layers or shape.layers
        if self.drop[-1] >= shape.layers or len(self.drop) == shape.layers:
            raise ConfigError(
                f"depth axis: cannot drop layers {list(self.drop)} of {shape.layers}",
                hint=f"layers are numbered 0 to {shape.layers - 1}, and one must stay",
            )
        return shape.layers - len(self.drop)

    def legal(self, shape: ModelShape) -> list[int]:
        """See the base class."""
        return list(range(1, shape.layers + 1))

    def read(self, shape: ModelShape) -> int:
        """See the base class."""
        return shape.layers

    def write(self, shape: ModelShape, size: int) -> ModelShape:
        """See the base class; of layers that differ as many of each kind stay as before."""
        return shape.with_layers(size)

    def resized(self, size: int) -> Self:
        """See the base class."""
        return self if self.drop is not None else self.model_copy(update={"layers": size})

    def rehearsed(self) -> Self:
        """One of two layers stays."""
        return self.model_copy(update={"layers": 1, "drop": None})

    def run_length(self, shape: ModelShape) -> int:
        """Layers that are judged together: all that go if they go as one run, else one."""
        count = shape.layers - self.target(shape)
        return count if self.contiguous and count else 1

    def keep(self, scores: "list[Tensor]", shape: ModelShape) -> "list[Tensor]":
        """All layers but the ones named, the run that scores lowest, or the lowest ones."""
        import torch

        drop = set(self.drop or self._lowest([float(score) for score in scores], shape))
        return [torch.tensor([index for index in range(shape.layers) if index not in drop])]

    def _lowest(self, scores: list[float], shape: ModelShape) -> list[int]:
        count = shape.layers - self.target(shape)
        length = self.run_length(shape)

        def rank(first: int) -> tuple[bool, float]:
            at_an_end = first == 0 or first + length == shape.layers
            return at_an_end, scores[first]

        order = sorted(range(len(scores)), key=rank)
        if self.contiguous and count:
            return list(range(order[0], order[0] + count))
        return order[:count]

    def cut(
        self,
        model: "PreTrainedModel",
        architecture: "Architecture",
        keep: "Sequence[Tensor]",
    ) -> None:
        """Keep the chosen layers and renumber them."""
        (kept,) = keep
        architecture.keep_layers(model, kept.tolist())
