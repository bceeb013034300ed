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
        ModelError: if the model has no such size, one that was asked for is illegal, or the model
            fits the budget unpruned.
    """
    check_axes(axes, budget)
    target = target or Target()
    result = shape
    for axis in axes:
        result = axis.write(result, _checked(axis, axis.target(shape), shape))
    if budget is not None:
        deployed = budget.deployed(target)
        deployed.check(shape)
        opened = [axis for axis in axes if axis.is_open]
        if len(opened) > 1:
            raise ConfigError(
                f"{len(opened)} axes without a size: {', '.join(axis.kind for axis in opened)}",
                hint="give every axis but one its size; trt-kd prune searches over several",
            )
        return _largest(opened[0], deployed, target, shape, result)
    architecture_of(shape.model_type).check_shape(result)
    check(result, target, original=shape)
    return result


def settled(axes: "Sequence[Axis]", planned: ModelShape) -> "list[Axis]":
    """The axes with every open size filled in from ``planned``."""
    return [axis.resized(axis.read(planned)) for axis in axes]


def check_axes(axes: "Sequence[Axis]", budget: Budget | None) -> None:
    """Check that the axes differ and that some are open if and only if there is a budget.

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
    if budget is not None and not opened:
        raise ConfigError(
            "a budget needs an axis without a size, found none",
            hint="leave out one axis' size, or the budget",
        )


def waypoints(axes: "Sequence[Axis]", shape: ModelShape, rounds: int) -> "list[list[Axis]]":
    """The axes of every one of ``rounds`` cuts; the last one has the sizes of ``axes``.

    Sizes fall by the same factor every time, as far as their grids allow. Layers that are named by
    number go in the first cut. A cut that changes nothing, or that the family's stock code does
    not take, is left out.
    """
    numbered = [axis for axis in axes if axis.resized(1).target(shape) != 1]
    others = [axis for axis in axes if axis not in numbered]
    architecture, before, found = architecture_of(shape.model_type), shape, []
    for number in range(1, rounds + 1):
        taking = [_waypoint(axis, shape, number / rounds) for axis in others]
        taking += numbered if number == 1 else []
        after = before
        for axis in taking:
            after = axis.write(after, axis.target(before))
        last = number == rounds
        if last or (after != before and architecture.takes(after)):
            found.append(taking)
            before = after
    return found


def _waypoint(axis: "Axis", shape: ModelShape, progress: float) -> "Axis":
    present, goal = axis.read(shape), axis.target(shape)
    wanted = present * (goal / present) ** progress
    sizes = [size for size in axis.legal(shape) if size >= goal]
    return axis.resized(goal if progress == 1.0 else min(sizes, key=lambda s: abs(s - wanted)))


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


def _largest(
    axis: "Axis", budget: Budget, target: Target, shape: ModelShape, fixed: ModelShape
) -> ModelShape:
    sizes = [axis.write(fixed, size) for size in axis.legal(shape)]
    takes = architecture_of(shape.model_type).takes
    legal = [one for one in sizes if takes(one) and not refused(one, target, original=shape)]
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
