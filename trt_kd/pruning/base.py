"""What an axis and an importance are; importing it needs no torch.

Shapes: B sequences, L tokens, C channels of a site, H hidden, S sites (places of one axis).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from typing_extensions import Self

from trt_kd.architectures.shape import ModelShape
from trt_kd.config import Plugin

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn
    from transformers import PreTrainedModel

    from trt_kd.architectures.base import Architecture

Unit = Literal["channels", "layers"]


class Importance(Plugin, ABC):
    """A score for every channel or layer, summed batch by batch over the calibration text."""

    units: ClassVar[frozenset[Unit]]
    """What it can score."""

    @abstractmethod
    def contribution(self, *states: "Tensor") -> "Tensor":
        """What one batch adds to the total.

        For channels: one tensor ``[B, L, C]`` gives ``[C]``. For layers: the residual stream
        before and after a run of layers, each ``[B, L, H]``, gives ``[]``.
        """

    @abstractmethod
    def scores(self, total: "Tensor", generator: "Generator") -> "Tensor":
        """Turn totals of any shape into scores of that shape: what scores low is cut first."""


@dataclass
class Site:
    """A module whose input or output shows the channels of an axis at work."""

    module: "nn.Module"
    side: Literal["input", "output"]


@dataclass
class Recording:
    """What the hooked passes saw of the unpruned model, in float64 unless it says otherwise."""

    channels: "dict[str, list[Tensor]]" = field(default_factory=dict)
    """By kind of axis: per site the sum of the importance's contributions, ``[C]``."""
    influence: "list[float]" = field(default_factory=list)
    """Block influence per layer: mean over tokens of 1 - cos(input, output)."""
    runs: "list[Tensor]" = field(default_factory=list)
    """Per first layer of a run of the axis' length: the sum of contributions, ``[]``."""
    gram: "dict[int, Tensor]" = field(default_factory=dict)
    """By layer, float32: Gram matrix of the inputs of its down projection, ``[C, C]``."""
    tokens: int = 0
    """Calibration tokens of the scoring pass."""


class Axis(Plugin, ABC):
    """One size of a decoder that can shrink, and how; the size may be left open to be solved."""

    constraint: ClassVar[str]
    """Its key in ModelOpt's ``export_config``."""
    shape_field: ClassVar[str]
    """Its field of ``ModelShape``."""
    unit: ClassVar[Unit]
    """What it cuts."""

    @property
    @abstractmethod
    def is_open(self) -> bool:
        """Whether its size is left to be solved from a share of the parameters."""

    @abstractmethod
    def target(self, shape: ModelShape) -> int:
        """The size asked for; of an open axis the present one."""

    @abstractmethod
    def legal(self, shape: ModelShape) -> list[int]:
        """Sizes it can take, ascending; the last one is the present size."""

    @abstractmethod
    def resized(self, size: int) -> Self:
        """The same axis with its size settled."""

    @abstractmethod
    def rehearsed(self) -> Self:
        """The same axis for a model of two layers."""

    @abstractmethod
    def sites(self, model: "PreTrainedModel", architecture: "Architecture") -> list[Site]:
        """Where its channels show; none for an axis that cuts layers."""

    @abstractmethod
    def keep(self, scores: "list[Tensor]", shape: ModelShape) -> "list[Tensor]":
        """Indices to keep, ascending, one tensor per place where they differ."""

    @abstractmethod
    def cut(
        self,
        model: "PreTrainedModel",
        architecture: "Architecture",
        keep: "Sequence[Tensor]",
    ) -> None:
        """Cut ``model`` in place down to ``keep`` and write the new size into its config."""
