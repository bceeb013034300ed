"""Which sizes a model has after pruning, from closed-form counts; needs no torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trt_kd.architectures import architecture_of
from trt_kd.architectures.shape import ModelShape
from trt_kd.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from trt_kd.pruning.base import Axis


def grid(size: int, multiple_of: int) -> list[int]:
    """Multiples of ``multiple_of`` below ``size``, and ``size`` itself, ascending."""
    return [*range(multiple_of, size, multiple_of), size]


def planned_shape(
    axes: "Sequence[Axis]", parameters_share: float | None, shape: ModelShape
) -> ModelShape:
    """The shape of a model of ``shape`` after pruning along ``axes``.

    With ``parameters_share`` exactly one axis leaves its size open and gets the largest legal
    one with which the model keeps at most that share of its parameters.

    Raises:
        ConfigError: if the axes contradict each other or the share.
        ModelError: if the model has no such size.
    """
    limit = None if parameters_share is None else parameters_share * shape.parameters
    return fitted_shape(axes, limit, shape)


def fitted_shape(axes: "Sequence[Axis]", limit: float | None, shape: ModelShape) -> ModelShape:
    """Like ``planned_shape`` with the limit as a number of parameters.

    Raises:
        ConfigError: if the axes contradict each other or the limit.
        ModelError: if the model has no such size.
    """
    check_axes(axes, limit)
    result = shape
    for axis in axes:
        size = _checked(axis, axis.target(shape), shape)
        result = axis.write(result, size)
    if limit is not None:
        (axis,) = (axis for axis in axes if axis.is_open)
        result = _largest(axis, limit, shape, result)
    return result


def settled(axes: "Sequence[Axis]", planned: ModelShape) -> "list[Axis]":
    """The axes with every open size filled in from ``planned``."""
    return [axis.resized(axis.read(planned)) for axis in axes]


def check_axes(axes: "Sequence[Axis]", limit: float | None) -> None:
    """Check that the axes differ and that one is open if and only if there is a limit.

    Raises:
        ConfigError: if not.
    """
    kinds = [axis.kind for axis in axes]
    if len(set(kinds)) < len(kinds):
        raise ConfigError(f"axes {', '.join(kinds)}: one stands twice", hint="write each axis once")
    opened = [axis.kind for axis in axes if axis.is_open]
    if limit is None and opened:
        raise ConfigError(
            f"axis {opened[0]!r} has no size",
            hint="give it one, or give parameters_share to have it solved",
        )
    if limit is not None and len(opened) != 1:
        found = ", ".join(opened) if opened else "none"
        raise ConfigError(
            f"parameters_share needs exactly one axis without a size, found {found}",
            hint="give every axis but one its size" if opened else "leave out one axis' size",
        )


def _checked(axis: "Axis", size: int, shape: ModelShape) -> int:
    legal = axis.legal(shape)
    if size > legal[-1]:
        raise ModelError(
            f"axis {axis.kind!r}: {size} is larger than the model's {legal[-1]}",
            hint=f"pruning only shrinks: ask for at most {legal[-1]}",
        )
    if size not in legal:
        below = [str(value) for value in legal if value < size][-1:]
        above = [str(value) for value in legal if value > size][:1]
        raise ModelError(
            f"axis {axis.kind!r}: {size} is off the grid of legal sizes",
            hint=f"the nearest ones are {' and '.join(below + above)}; see multiple_of",
        )
    return size


def _accepted(shape: ModelShape) -> bool:
    """Whether the stock code of the family takes these sizes together."""
    try:
        architecture_of(shape.model_type).check_shape(shape)
    except ModelError:
        return False
    return True


def _largest(axis: "Axis", limit: float, shape: ModelShape, fixed: ModelShape) -> ModelShape:
    candidates = [axis.write(fixed, size) for size in axis.legal(shape)]
    candidates = [candidate for candidate in candidates if _accepted(candidate)]
    fitting = [candidate for candidate in candidates if candidate.parameters <= limit]
    if not fitting:
        least = candidates[0].parameters
        raise ModelError(
            f"axis {axis.kind!r} cannot bring the model to {limit:,.0f} parameters "
            f"({limit / shape.parameters:.1%})",
            hint=f"its smallest size leaves {least:,} ({least / shape.parameters:.1%}): "
            "raise the share or prune another axis too",
        )
    return fitting[-1]
