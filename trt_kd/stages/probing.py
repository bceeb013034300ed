"""Which sizes to measure: the ends of every axis, all of them together, and points in between."""

from collections.abc import Sequence

from trt_kd.architectures import architecture_of
from trt_kd.architectures.shape import ModelShape
from trt_kd.errors import ModelError
from trt_kd.exporters.base import Exporter
from trt_kd.pruning.base import Axis

LEAST = 3
"""Models besides the unpruned one without which nothing can be fitted."""
_DRAWS = 4096


def sizes_to_try(axis: Axis, shape: ModelShape, width: float, depth: float) -> list[int]:
    """Sizes of ``axis``, ascending, that cut at most ``width`` or, of the layers, ``depth``."""
    present = axis.read(shape)
    limit = depth if axis.unit == "layers" else width
    return [size for size in axis.legal(shape) if 1 - size / present <= limit]


def probes(
    axes: Sequence[Axis],
    shape: ModelShape,
    lanes: Sequence[Exporter],
    *,
    count: int,
    limits: tuple[float, float],
    seed: int,
) -> list[ModelShape]:
    """At most ``count`` shapes smaller than ``shape``, of which each lane takes every one.

    ``limits`` are the largest shares of any width and of the layers that are cut.
    Every axis at its smallest alone and all axes at their smallest come first: a fit is best
    determined by the ends. The rest fill the space evenly (a scrambled Sobol sequence, Owen 1998).

    Raises:
        ModelError: if the axes have too few sizes to fit anything.
    """
    choices = [sizes_to_try(axis, shape, *limits) for axis in axes]
    present = [axis.read(shape) for axis in axes]
    least = [sizes[0] for sizes in choices]
    ends = [
        [least[j] if j == i else present[j] for j in range(len(axes))] for i in range(len(axes))
    ]
    found: dict[ModelShape, None] = {}
    for sizes in [*ends, least, *_spread(choices, seed)]:
        made = resized(axes, shape, sizes)
        if made is not None and made != shape and not _refused(made, lanes):
            found.setdefault(made)
        if len(found) == count:
            break
    if len(found) < LEAST:
        raise ModelError(
            f"the axes offer {len(found)} sizes that every lane takes, too few to time",
            hint="raise max_width_pruning or max_depth_pruning, or name another axis",
        )
    return list(found)


def resized(axes: Sequence[Axis], shape: ModelShape, sizes: Sequence[int]) -> ModelShape | None:
    """``shape`` with the axes at ``sizes``; None where the family's stock code takes no such."""
    made = shape
    for axis, size in zip(axes, sizes, strict=True):
        made = axis.write(made, size)
    read = [axis.read(made) for axis in axes]
    return made if read == list(sizes) and architecture_of(made.model_type).takes(made) else None


def _spread(choices: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
    """Points that fill the space of the sizes, over and over."""
    from scipy.stats import qmc

    points = qmc.Sobol(len(choices), seed=seed).random(_DRAWS)
    return [
        [sizes[min(int(value * len(sizes)), len(sizes) - 1)] for value, sizes in pairs]
        for pairs in (zip(point, choices, strict=True) for point in points.tolist())
    ]


def _refused(shape: ModelShape, lanes: Sequence[Exporter]) -> bool:
    return any(lane.check(shape, "checkpoint") for lane in lanes)
