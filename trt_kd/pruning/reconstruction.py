"""After a projection lost inputs, refit it to do the most with what is left."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat

from trt_kd.config import StrictModel

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trt_kd.pruning.base import Place
    from trt_kd.pruning.ridge import Gram, Refit


Schedule = Literal["once", "sequential"]


class Reconstruct(StrictModel):
    """One ridge regression per projection, see ``ridge.py``.

    It serves down projections after an MLP cut, and output projections after a cut of heads.
    """

    schedule: Schedule = "once"
    """``once``: all on the unpruned model's activations. ``sequential``: layer after layer on what
    the pruned layers before make of the text, with three more passes over it."""

    ridges: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.001, 0.01, 0.1)
    """Pulls towards the plain cut to choose from, as shares of the mean squared activation."""
    memory_gib: PositiveFloat = 4.0
    """Limit for the Gram matrices held at once; more than fit cost more forward passes."""

    def groups(self, widths: Sequence[int]) -> list[list[int]]:
        """Numbers of the projections, by their ``widths``, whose matrices are held at once."""
        groups: list[list[int]] = [[]]
        held = 0
        for number, width in enumerate(widths):
            if groups[-1] and held + gram_bytes(width) > self.memory_gib * 2**30:
                groups.append([])
                held = 0
            groups[-1].append(number)
            held += gram_bytes(width)
        return groups

    def memory_bytes(self, widths: Sequence[int]) -> int:
        """Most bytes it holds at once: one group's matrices and one solution in float64."""
        if not widths:
            return 0
        held = [
            sum(gram_bytes(widths[number]) for number in group) for group in self.groups(widths)
        ]
        return max(held) + 6 * gram_bytes(max(widths))


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


def refit_all(
    grams: "Mapping[nn.Module, Gram]",
    keep: "Mapping[nn.Linear, Tensor]",
    reconstruct: Reconstruct,
) -> "dict[nn.Linear, Refit]":
    """Solve for every projection in ``grams``; the model stays as it is."""
    from trt_kd.pruning.ridge import refit

    return {
        consumer: refit(consumer.weight, grams[consumer], keep_K, reconstruct.ridges)
        for consumer, keep_K in keep.items()
        if consumer in grams
    }


def write_refits(refits: "Mapping[nn.Linear, Refit]", keep: "Mapping[nn.Linear, Tensor]") -> None:
    """Put the solutions into the columns that will be kept, so that any order of cuts works."""
    import torch

    with torch.no_grad():
        for consumer, solution in refits.items():
            consumer.weight[:, keep[consumer]] = solution.weight.to(consumer.weight)
