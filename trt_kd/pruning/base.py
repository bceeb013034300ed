"""What an axis and an importance are; importing it needs no torch.

Shapes: B sequences, L tokens, C channels of a site, H hidden.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveInt
from typing_extensions import Self

from trt_kd.architectures.shape import ModelShape, shape_from_config
from trt_kd.config import Plugin
from trt_kd.pruning.sizes import grid

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Generator, Tensor, nn
    from transformers import PreTrainedModel

    from trt_kd.architectures.base import Architecture, Slice

Unit = Literal["channels", "layers", "tokens"]

Evidence = Literal["states", "gradients", "losses"]


class Importance(Plugin, ABC):
    """A score for every channel or layer, summed batch by batch over the calibration text."""

    units: ClassVar[frozenset[Unit]]
    """What it can score."""
    evidence: ClassVar[Evidence] = "states"
    """What it is shown; anything but states takes passes of its own."""

    @abstractmethod
    def contribution(self, *states: "Tensor") -> "Tensor":
        """What one batch adds to the total.

        For channels: one tensor ``[B, L, C]`` gives ``[C]``. For layers: the residual stream
        before and after a run of layers, each ``[B, L, H]``, gives ``[]``. If it asks for
        gradients, that of the loss with respect to the last of these comes last. If it asks for
        losses, two ``[]`` are all: of the whole model, and of the model without a run of layers.
        """

    def combined(self, total: "Tensor", contribution: "Tensor") -> "Tensor":
        """The total with one more batch."""
        return total + contribution

    def accumulate(self, totals: "list[Tensor]", index: int, contribution: "Tensor") -> None:
        """Add one batch to one of ``totals``, in place.

        A total made anew with every batch would lie between the temporaries of the model and split
        the space that they leave, which cost a quarter of a forward pass's memory.
        """
        total = totals[index].to(contribution.device)
        totals[index] = total.copy_(self.combined(total, contribution))

    def most_blocks(self) -> int | None:
        """Calibration sequences that losses are taken over at most; None for all."""
        return None

    @abstractmethod
    def scores(self, total: "Tensor", generator: "Generator") -> "Tensor":
        """Turn totals of any shape into scores of that shape: what scores low is cut first."""


@dataclass
class Site:
    """A module whose input or output shows the units of an axis at work."""

    module: "nn.Module"
    side: Literal["input", "output"]
    width: int = 1
    """Neighbouring channels that make one unit; a unit's size is their L2 norm."""
    read: "Callable[[Tensor], Tensor] | None" = None
    """Turns what passes there into one number per unit in its last dimension, if need be."""
    pair: "Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None" = None
    """Where ``read`` is set: states and their gradients, both with one number per unit in the last
    dimension, from what enters the module and the loss's gradient where it leaves."""


@dataclass
class Place:
    """Units that are ranked among each other, and every parameter that follows them."""

    sites: tuple[Site, ...]
    slices: "tuple[Slice, ...]" = ()
    layer: int | None = None
    """The layer it lies in; None if it runs through all of them."""
    consumer: "nn.Linear | None" = None
    """The projection that reads the units, which can be refit to those that are kept."""
    cut: "Callable[[Tensor], None] | None" = None
    """Drops all units but these, where slices cannot say how."""
    whole: int = 0
    """How many units there are, where slices cannot say."""

    @property
    def units(self) -> int:
        """How many there are."""
        return self.slices[-1].units if self.slices else self.whole


@dataclass
class Recording:
    """What the hooked passes saw of the unpruned model, in float64 unless it says otherwise."""

    channels: "dict[str, list[list[Tensor]]]" = field(default_factory=dict)
    """By kind of axis: per place and site the sum of the importance's contributions, ``[C]``."""
    influence: "list[float]" = field(default_factory=list)
    """Block influence per layer: mean over tokens of 1 - cos(input, output)."""
    runs: "list[Tensor]" = field(default_factory=list)
    """Per first layer of a run of the axis' length: the sum of contributions, ``[]``."""
    tokens: int = 0
    """Calibration tokens of the scoring pass."""


class Axis(Plugin, ABC):
    """One size of a decoder that can shrink, and how; the size may be left open to be solved."""

    constraint: ClassVar[str]
    """Its key in ModelOpt's ``export_config``."""
    shape_field: ClassVar[str]
    """Its field of ``ModelShape``, counted as that constraint counts it."""
    unit: ClassVar[Unit]
    """What it cuts."""

    @property
    @abstractmethod
    def is_open(self) -> bool:
        """Whether its size is left to be solved from a budget."""

    @abstractmethod
    def target(self, shape: ModelShape) -> int:
        """The size asked for; of an open axis the present one."""

    @abstractmethod
    def legal(self, shape: ModelShape) -> list[int]:
        """Sizes it can take, ascending; the last one is the present size."""

    @abstractmethod
    def read(self, shape: ModelShape) -> int:
        """Its size in ``shape``."""

    @abstractmethod
    def write(self, shape: ModelShape, size: int) -> ModelShape:
        """``shape`` with that size and all that follows from it."""

    @abstractmethod
    def resized(self, size: int) -> Self:
        """The same axis with its size settled."""

    @abstractmethod
    def rehearsed(self) -> Self:
        """The same axis for a model of two layers."""

    @abstractmethod
    def keep(self, scores: "list[Tensor]", shape: ModelShape) -> "list[Tensor]":
        """Indices to keep, ascending, one tensor per place."""

    @abstractmethod
    def cut(
        self,
        model: "PreTrainedModel",
        architecture: "Architecture",
        keep: "Sequence[Tensor]",
    ) -> None:
        """Cut ``model`` in place down to ``keep`` and write the new size into its config."""


class WidthAxis(Axis):
    """An axis that cuts channels, or runs of them, out of every layer."""

    unit: ClassVar[Unit] = "channels"
    size: PositiveInt | None = None
    """Size after pruning; open: solved from a budget."""
    multiple_of: PositiveInt = 64
    """Tile of the matrix units and of block-wise quantization; off the grid saves no time."""

    @abstractmethod
    def places(self, model: "PreTrainedModel", architecture: "Architecture") -> list[Place]:
        """Where its units lie, first layer to last."""

    @property
    def is_open(self) -> bool:
        """See the base class."""
        return self.size is None

    def target(self, shape: ModelShape) -> int:
        """See the base class."""
        return self.size or self.read(shape)

    def legal(self, shape: ModelShape) -> list[int]:
        """See the base class."""
        return grid(self.read(shape), self.multiple_of)

    def read(self, shape: ModelShape) -> int:
        """See the base class."""
        return int(getattr(shape, self.shape_field))

    def write(self, shape: ModelShape, size: int) -> ModelShape:
        """See the base class."""
        return shape.with_sizes(**{self.shape_field: size})

    def resized(self, size: int) -> Self:
        """See the base class."""
        return self.model_copy(update={"size": size})

    def rehearsed(self) -> Self:
        """See the base class."""
        return self

    def keep(self, scores: "list[Tensor]", shape: ModelShape) -> "list[Tensor]":
        """The best units of every place by its own scores."""
        from trt_kd.pruning.slicing import best

        return [best(scores_C, self.target(shape)) for scores_C in scores]

    def cut(
        self,
        model: "PreTrainedModel",
        architecture: "Architecture",
        keep: "Sequence[Tensor]",
    ) -> None:
        """See the base class."""
        from trt_kd.pruning.slicing import cut

        for place, keep_K in zip(self.places(model, architecture), keep, strict=True):
            if place.cut is not None:
                place.cut(keep_K)
            else:
                cut(place.slices, keep_K, norm_offset=architecture.norm_offset)
        self.after_cut(model, architecture, keep)

    def after_cut(
        self,
        model: "PreTrainedModel",
        architecture: "Architecture",
        keep: "Sequence[Tensor]",
    ) -> None:
        """Write the size asked for into the config and the modules of ``model``."""
        before = shape_from_config(model.config.to_dict())
        after = self.write(before, self.target(before))
        architecture.record(model, **after.changes(before))
