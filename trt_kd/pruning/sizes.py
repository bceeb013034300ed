"""Which sizes a model has after pruning, from closed-form counts; needs no torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trt_kd.architectures import architecture_of
from trt_kd.architectures.shape import ModelShape
from trt_kd.errors import ConfigError, ModelError
from trt_kd.pruning.budget import Budget, amount
from trt_kd.pruning.catalogue import Target, check, refused

if TYPE_CHECKING:
    from trt_kd.pruning.base import Axis


def grid(size: int, multiple_of: int) -> list[int]:
    """Multiples of ``multiple_of`` below ``size``, and ``size`` itself, ascending."""
    return [*range(multiple_of, size, multiple_of), size]


def planned_shape(
    axes: "Sequence[Axis]", budget: Budget | None, shape: ModelShape, target: Target | None = None
) -> ModelShape:
    """The shape of a model of ``shape`` after pruning along ``axes``.

    With a budget exactly one axis leaves its size open and gets the largest one that fits, that
    the family's stock code takes, and that is legal for ``target``.

    Raises:
        ConfigError: if the axes contradict each other or the budget.
        ModelError: if the model has no such size, or one that was asked for is illegal.
    """
    check_axes(axes, budget)
    target = target or Target()
    result = shape
    for axis in axes:
        result = axis.write(result, _checked(axis, axis.target(shape), shape))
    if budget is not None:
        (axis,) = (axis for axis in axes if axis.is_open)
        return _largest(axis, budget.deployed(target), target, shape, result)
    architecture_of(shape.model_type).check_shape(result)
    check(result, target, original=shape)
    return result


def settled(axes: "Sequence[Axis]", planned: ModelShape) -> "list[Axis]":
    """The axes with every open size filled in from ``planned``."""
    return [axis.resized(axis.read(planned)) for axis in axes]


def check_axes(axes: "Sequence[Axis]", budget: Budget | None) -> None:
    """Check that the axes differ and that one is open if and only if there is a budget.

    Raises:
        ConfigError: if not.
    """
    kinds = [axis.kind for axis in axes]
    if len(set(kinds)) < len(kinds):
        raise ConfigError(f"axes {', '.join(kinds)}: one stands twice", hint="write each axis once")
    opened = [axis.kind for axis in axes if axis.is_open]
    if budget is None and opened:
        raise ConfigError(
            f"axis {opened[0]!r} has no size",
            hint="give it one, or give a budget to have it solved",
        )
    if budget is not None and len(opened) != 1:
        found = ", ".join(opened) if opened else "none"
        raise ConfigError(
            f"a budget needs exactly one axis without a size, found {found}",
            hint="see the choices with trt-kd prune --dry-run, and give every axis but one its size"
            if opened
            else "leave out one axis' size, or the budget",
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


def _accepted(candidate: ModelShape, target: Target, original: ModelShape) -> bool:
    """Whether the family's stock code and the target take these sizes together."""
    try:
        architecture_of(original.model_type).check_shape(candidate)
    except ModelError:
        return False
    return not refused(candidate, target, original=original)


def _largest(
    axis: "Axis", budget: Budget, target: Target, shape: ModelShape, fixed: ModelShape
) -> ModelShape:
    sizes = [axis.write(fixed, size) for size in axis.legal(shape)]
    legal = [candidate for candidate in sizes if _accepted(candidate, target, shape)]
    fitting = [candidate for candidate in legal if budget.fits(candidate, shape)]
    if fitting:
        return fitting[-1]
    limits = budget.limits(shape)
    wanted = " and ".join(amount(name, limit) for name, limit in limits.items())
    if not legal:
        raise ModelError(
            f"axis {axis.kind!r} has no size that is legal for {target}",
            hint="choose another axis, another multiple_of or another target",
        )
    values = budget.values(legal[0])
    least = " and ".join(amount(name, values[name]) for name in limits)
    raise ModelError(
        f"axis {axis.kind!r} cannot bring the model to {wanted}",
        hint=f"its smallest size leaves {least}: raise the budget or prune another axis too",
    )
