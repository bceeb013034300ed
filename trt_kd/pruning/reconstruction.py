"""After a projection lost inputs, refit it to do the most with what is left."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from pydantic import Field, PositiveFloat

from trt_kd.config import StrictModel
from trt_kd.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trt_kd.architectures.shape import ModelShape
    from trt_kd.pruning.base import Place
    from trt_kd.pruning.readings import Reading
    from trt_kd.pruning.ridge import Gram

R = TypeVar("R", bound="Reading")

Schedule = Literal["once", "sequential"]

SEQUENTIAL = frozenset({"ffn", "heads", "kv_heads", "depth"})
"""Axes whose cut leaves the residual stream's size and every token's way as they are."""
SHARES = (0.3, 1.0)
"""Shares of what dropped layers added that a fold may make up for."""
PROOF_SEQUENCES = 4
"""Sequences that prove folds, at most; an eighth of a short text."""
PROOF_ROWS = 256
"""Tokens whose distributions are compared at once."""
ROWS = 640
"""Outputs of a projection, or columns of a Gram matrix, that stand there in float64 at once."""


class Reconstruct(StrictModel):
    """One ridge regression per projection, see ``ridge.py`` and ``readings.py``.

    It serves down projections after a cut of MLPs or experts, output projections after one of
    heads, and all that reads the residual stream after one of its channels.
    """

    schedule: Schedule = "once"
    """``once``: all on the unpruned model's activations. ``sequential``: layer after layer on what
    the pruned layers before make of the text, with two more passes over it."""

    ridges: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.001, 0.01, 0.1)
    """Pulls towards the plain cut to choose from, as shares of the mean squared activation."""
    accumulation: Literal["float32", "float64"] = "float32"
    """Precision of the sums over tokens; float64 takes twice the memory and most of the time."""
    memory_gib: PositiveFloat = 1.0
    """Limit for the Gram matrices held at once; more than fit cost more forward passes."""

    def groups(self, widths: Sequence[int]) -> list[list[int]]:
        """Numbers of the projections, by their ``widths``, whose matrices are held at once.

        The last projections come first, so that what is refit does not touch what comes later.
        """
        groups: list[list[int]] = [[]]
        held = 0
        for number in reversed(range(len(widths))):
            if groups[-1] and held + self._bytes(widths[number]) > self.memory_gib * 2**30:
                groups.append([])
                held = 0
            groups[-1].insert(0, number)
            held += self._bytes(widths[number])
        return groups

    def grouped(self, readings: "Sequence[R]") -> "list[list[R]]":
        """``readings``, given as they run, by what is held at once; the last ones first."""
        groups = self.groups([reading.width for reading in readings])
        return [[readings[number] for number in group] for group in groups if group]

    def memory_bytes(self, widths: Sequence[int]) -> int:
        """Most bytes it holds at once: one group's matrices and what solves for one projection.

        That is the kept inputs' part of both matrices, a factor in float64, and some outputs.
        """
        if not widths:
            return 0
        held = [
            sum(self._bytes(widths[number]) for number in group) for group in self.groups(widths)
        ]
        return max(held) + 2 * self._bytes(max(widths)) + 10 * 8 * ROWS * max(widths)

    def check(self, kinds: Iterable[str]) -> None:
        """Check that the schedule goes with these kinds of axes.

        Raises:
            ConfigError: naming those that it does not go with.
        """
        others = set(kinds) - SEQUENTIAL if self.schedule == "sequential" else None
        if others:
            raise ConfigError(
                f"reconstruct.schedule sequential does not go with {', '.join(sorted(others))}",
                hint=f"it goes with {', '.join(sorted(SEQUENTIAL))}; schedule once with all",
            )

    def gram(self) -> "Gram":
        """Gram matrices that have seen nothing, in the precision asked for."""
        import torch

        from trt_kd.pruning.ridge import Gram

        return Gram(getattr(torch, self.accumulation))

    def _bytes(self, width: int) -> int:
        return gram_bytes(width) * (2 if self.accumulation == "float64" else 1)


def fold_bytes(shape: "ModelShape", tokens: int) -> int:
    """Most bytes that proving a fold holds besides a pass, with sequences of ``tokens``.

    That is what leaves the last layer and what enters one, of the unpruned model and of a
    candidate, and some tokens' distributions of both.
    """
    return 4 * (3 * PROOF_SEQUENCES * tokens * shape.hidden + 4 * PROOF_ROWS * shape.vocab)


def proof_sequences(total: int) -> int:
    """Sequences of ``total`` that stay out of a fold's fit; none of fewer than three."""
    return min(PROOF_SEQUENCES, max(1, total // 8)) if total >= 3 else 0


def gram_bytes(width: int) -> int:
    """Bytes of the two Gram matrices of a projection of ``width`` inputs, in float32."""
    return 2 * 4 * width**2


def kept_inputs(
    places: "Mapping[str, Sequence[Place]]", keep: "Mapping[str, Sequence[Tensor]]"
) -> "dict[nn.Linear, Tensor]":
    """Indices of the inputs that every projection keeps once all its axes are cut."""
    import torch

    masks: dict[nn.Linear, Tensor] = {}
    for kind, found in places.items():
        for place, keep_K in zip(found, keep[kind], strict=True):
            if place.consumer is None:
                continue
            inputs = place.consumer.in_features
            units = torch.zeros(place.units, dtype=torch.bool)
            units[keep_K.cpu()] = True
            mask = masks.setdefault(place.consumer, torch.ones(inputs, dtype=torch.bool))
            mask &= units.repeat_interleave(inputs // place.units)
    return {consumer: mask.nonzero().flatten() for consumer, mask in masks.items()}


def in_order(layers: "nn.ModuleList", consumers: "Iterable[nn.Linear]") -> "dict[nn.Linear, int]":
    """``consumers`` with their layers as they run: layer by layer, attention before the MLP."""
    wanted = set(consumers)
    return {
        module: index
        for index, layer in enumerate(layers)
        for module in layer.modules()
        if module in wanted
    }


@contextmanager
def first_layers(layers: "nn.ModuleList", count: int) -> Iterator[None]:
    """Take the layers behind the first ``count`` off the model meanwhile."""
    rest = list(layers[count:])
    del layers[count:]
    try:
        yield
    finally:
        layers.extend(rest)
