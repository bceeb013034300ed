"""All legal sizes that fit a budget: a grid search over closed forms, before any compute is spent.

``ModelShape``, the budget and the catalogue are plain arithmetic, so they take arrays of sizes as
they take numbers: a whole block of the grid is one evaluation.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from math import prod
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, SerializeAsAny

from trt_kd.architectures import architecture_of
from trt_kd.architectures.shape import ModelShape
from trt_kd.config import StrictModel, build_plugin
from trt_kd.errors import ModelError
from trt_kd.pruning import AXES
from trt_kd.pruning.base import Axis
from trt_kd.pruning.budget import Budget, amount
from trt_kd.pruning.catalogue import SIZES, Target, Violation, bound, violations

_BLOCK = 2**20
"""Points that are evaluated at once; some hundred bytes each."""
_STAND_IN_SHARE = 0.8
"""Parameters that a plan counts with where only time is limited."""

_Columns = dict[str, NDArray[Any]]


class SearchSpace(StrictModel):
    """What to choose from, without a model: axes with or without a size, limits, a target."""

    axes: Annotated[
        list[Annotated[SerializeAsAny[Axis], BeforeValidator(partial(build_plugin, AXES))]],
        Field(min_length=1),
    ]
    """What shrinks; sizes left out are tried at every legal value."""
    budget: Budget
    """Limits that every candidate keeps."""
    target: Target = Target()
    """What every size has to be legal for."""


@dataclass(frozen=True)
class Candidate:
    """One choice of sizes that fits a budget."""

    original: ModelShape
    changed: dict[str, int]
    """Sizes by name that differ from the original's."""
    parameters: int
    active_parameters: int
    memory_bytes: int
    """Weights and key-value cache with the budget's formats and workload."""
    target: Target = field(repr=False)

    @cached_property
    def shape(self) -> ModelShape:
        """The shape after pruning."""
        return resized(self.original, self.changed)

    @cached_property
    def violations(self) -> tuple[Violation, ...]:
        """Rules it breaks: slow ones, and illegal ones only where the original breaks them too."""
        return tuple(violations(self.shape, self.target))

    @property
    def share(self) -> float:
        """Parameters kept."""
        return self.parameters / self.original.parameters


def resized(shape: ModelShape, sizes: Mapping[str, Any]) -> ModelShape:
    """``shape`` with other sizes, which may be arrays, and of every kind of layer its share."""
    changes = dict(sizes)
    made = shape.with_layers(changes.pop("layers")) if "layers" in changes else shape
    return replace(made, **changes)


def possible(
    axes: Sequence[Axis],
    shape: ModelShape,
    budget: Budget,
    target: Target,
    *,
    slack: float = 0.05,
) -> list[Candidate]:
    """What ``axes`` can make of a model of ``shape``, best use of the budget first.

    Axes without a size are tried at every one that is legal, together; memory counts in the format
    of ``target`` unless the budget names one. Up to ``slack`` of the budget may go unused, or any
    share of it if nothing nearer can be made.

    Raises:
        ModelError: if an axis is not the model's, nothing is legal or fits, or the model fits
            unpruned.
    """
    architecture = architecture_of(shape.model_type)
    for axis in axes:
        architecture.check_axis(axis.kind, shape)
    choices = size_choices(axes, shape)
    limits = budget.deployed(target)
    for share in (slack, 1.0):
        fitting = enumerate_candidates(shape, choices, limits, target, slack=share)
        found = [one for one in fitting if _makes(axes, one) and architecture.takes(one.shape)]
        if found:
            return found
    raise ModelError(
        f"none of the {len(fitting):,} combinations of sizes that fit can be made",
        hint=f"the stock code of a {shape.model_type} model takes none of them together: "
        "leave another axis open, or name other sizes",
    )


def size_choices(axes: Sequence[Axis], shape: ModelShape) -> dict[str, list[int]]:
    """Sizes to try by field of ``ModelShape``: all legal ones of open axes, else the one given."""
    choices: dict[str, set[int]] = {}
    groups = {shape.kv_heads}
    for axis in sorted(axes, key=lambda axis: axis.kind != "kv_heads"):
        sizes = axis.legal(shape) if axis.is_open else [axis.target(shape)]
        if axis.kind == "kv_heads":
            groups = set(sizes)
            choices["heads"] = {count * (shape.heads // shape.kv_heads) for count in groups}
        if axis.kind == "heads":
            choices["heads"] = {count * size for count in groups for size in sizes}
        else:
            choices[axis.shape_field] = set(sizes)
    return {name: sorted(sizes) for name, sizes in choices.items()}


def countable(budget: Budget, axes: Sequence[Axis], shape: ModelShape, target: Target) -> Budget:
    """``budget`` without limits on time; if it has no others, a share of the parameters for them.

    That share is 80 %, or halfway to the least that ``axes`` reach where they do not go so far.
    """
    if budget.latency is None:
        return budget
    update: dict[str, Any] = {"latency": None}
    if not budget.counts:
        least = _least_share(axes, shape, target)
        short = _STAND_IN_SHARE < least < 1
        update["params"] = (1 + least) / 2 if short else _STAND_IN_SHARE
    return budget.model_copy(update=update)


def _least_share(axes: Sequence[Axis], shape: ModelShape, target: Target) -> float:
    """Least share of the parameters that legal sizes leave; infinite where none is legal."""
    grid = size_choices(axes, shape)
    search = _Search(shape, grid, Budget(params=shape.parameters), target, 0.0)
    for block in _blocks(shape, grid):
        search.take(block)
    return search.least["params"] / shape.parameters


def _makes(axes: Sequence[Axis], candidate: Candidate) -> bool:
    """Whether the axes can make these sizes: heads and their groups do not go in every way."""
    original, shape = candidate.original, candidate.shape
    made = original
    for axis in axes:
        made = axis.write(made, axis.read(shape))
    return made == shape and shape.heads // shape.kv_heads <= original.heads // original.kv_heads


def enumerate_candidates(
    shape: ModelShape,
    choices: Mapping[str, Sequence[int]],
    budget: Budget,
    target: Target,
    *,
    slack: float = 0.05,
) -> list[Candidate]:
    """Every combination of ``choices`` that is legal, fits and uses the budget up, best use first.

    A combination is kept if its tightest limit is used to at least ``1 - slack``; the largest one
    under every single limit is kept whatever it leaves. A size that the model has already is never
    refused.

    Args:
        shape: the unpruned model.
        choices: sizes to try by field of ``ModelShape``; all others stay.
        budget: upper limits.
        target: what the sizes must be legal for.
        slack: share of the budget that may go unused.

    Raises:
        ModelError: if a size is larger than the model's, if no combination is legal or fits, or if
            the model fits unpruned.
        ValueError: if ``slack`` is no share, or a name or a list of sizes is not usable.
    """
    grid = _checked(shape, choices, slack)
    budget.check(shape)
    search = _Search(shape, grid, budget, target, slack)
    for block in _blocks(shape, grid):
        search.take(block)
    return search.candidates()


def _checked(
    shape: ModelShape, choices: Mapping[str, Sequence[int]], slack: float
) -> dict[str, list[int]]:
    if not 0 <= slack <= 1:
        raise ValueError(f"slack is a share of the budget, not {slack}")
    if not choices:
        raise ValueError("no sizes to choose from")
    grid = {}
    for name, sizes in choices.items():
        if name not in SIZES:
            raise ValueError(f"unknown size {name!r}; known: {', '.join(SIZES)}")
        present = getattr(shape, name)
        unique = sorted({int(size) for size in sizes}, reverse=True)
        if not unique or unique[-1] < 1:
            raise ValueError(f"sizes of {name} must be whole numbers above 0, and at least one")
        if unique[0] > present:
            raise ModelError(
                f"{name} {unique[0]} is larger than the model's {present}",
                hint=f"pruning only shrinks: try sizes of at most {present}",
            )
        grid[name] = unique
    return grid


def _blocks(shape: ModelShape, grid: Mapping[str, list[int]]) -> Iterator[dict[str, Any]]:
    """Sizes of a block: numbers, and arrays that broadcast to the block's points.

    Experts, and layers of a model whose layers differ, decide branches in the closed forms, so they
    stay numbers.
    """
    differ = shape.experts or shape.window_layers
    fixed = [name for name in grid if name == "experts" or (name == "layers" and differ)]
    free = [name for name in grid if name not in fixed]
    while prod(len(grid[name]) for name in free) > _BLOCK and len(free) > 1:
        fixed.append(free.pop(0))
    arrays = np.ix_(*(np.array(grid[name], dtype=np.int64) for name in free))
    for values in product(*(grid[name] for name in fixed)):
        yield dict(zip(fixed, values, strict=True)) | dict(zip(free, arrays, strict=True))


class _Search:
    """What the blocks seen so far hold."""

    def __init__(
        self,
        shape: ModelShape,
        grid: Mapping[str, list[int]],
        budget: Budget,
        target: Target,
        slack: float,
    ) -> None:
        self._shape, self._grid, self._budget = shape, grid, budget
        self._target, self._slack = target, slack
        self._limits = budget.limits(shape)
        self._rules = [
            (rule, name)
            for rule, name in bound(target, "illegal")
            if set(rule.fields(name)) & set(grid)
        ]
        self._refusals: dict[str, int] = {}
        self.least = dict.fromkeys(self._limits, np.inf)
        """What legal points cost at least, by limit."""
        self._kept: list[_Columns] = []
        self._largest: dict[str, tuple[float, dict[str, int]]] = {}

    def take(self, block: dict[str, Any]) -> None:
        """Look at the points of one block."""
        pruned = resized(self._shape, block)
        legal = self._legal(pruned)
        costs = self._budget.values(pruned)
        full = np.broadcast_shapes((1,), *(np.shape(x) for x in (legal, *block.values())))
        fits = np.broadcast_to(legal, full)
        usage = np.zeros(full)
        for name, cost in costs.items():
            self._note_least(name, cost, np.broadcast_to(legal, full))
            used = np.asarray(cost / self._limits[name])
            usage = np.maximum(usage, used)
            fits = fits & (cost <= self._limits[name])
        if not fits.any():
            return
        for name, cost in costs.items():
            self._note_largest(name, np.where(fits, cost, -np.inf), block)
        where = np.nonzero(fits & (usage >= 1 - self._slack))
        if len(where[0] if where else ()):
            self._keep({n: np.broadcast_to(v, full)[where] for n, v in block.items()})

    def _legal(self, pruned: ModelShape) -> Any:
        legal: Any = np.True_
        for rule, name in self._rules:
            broken = ~np.asarray(rule.satisfied(name, pruned, self._target), dtype=bool)
            changed: Any = np.False_
            for size in rule.fields(name):
                changed = changed | (getattr(pruned, size) != getattr(self._shape, size))
            refused = broken & changed
            self._refusals[rule.name] = self._refusals.get(rule.name, 0) + int(refused.sum())
            legal = legal & ~refused
        return legal

    def _note_least(self, name: str, cost: Any, legal: NDArray[Any]) -> None:
        if legal.any():
            least = float(np.where(legal, cost, np.inf).min())
            self.least[name] = min(self.least[name], least)

    def _note_largest(self, name: str, cost: NDArray[Any], block: dict[str, Any]) -> None:
        index = np.unravel_index(int(cost.argmax()), cost.shape)
        value = float(cost[index])
        if value > self._largest.get(name, (-np.inf,))[0]:
            sizes = {n: int(np.broadcast_to(v, cost.shape)[index]) for n, v in block.items()}
            self._largest[name] = (value, sizes)

    def _keep(self, sizes: _Columns) -> None:
        """Add points, one array ``[points]`` of sizes by name."""
        self._kept.append({name: sizes[name] for name in self._grid})

    def candidates(self) -> list[Candidate]:
        """The candidates kept, the one that uses its tightest limit best first."""
        if not self._largest:
            raise self._nothing()
        for _, sizes in self._largest.values():
            self._keep({name: np.array([size]) for name, size in sizes.items()})
        names = list(self._grid)
        table = np.concatenate(
            [np.stack([part[name] for name in names], axis=1) for part in self._kept]
        )
        table = np.unique(table, axis=0)[::-1]  # the larger sizes first among equals
        found = [
            (-usage, made)
            for start in range(0, len(table), _BLOCK)
            for usage, made in self._made(names, table[start : start + _BLOCK])
        ]
        found.sort(key=lambda pair: pair[0])
        return [made for _, made in found]

    def _made(
        self, names: list[str], table: NDArray[np.int64]
    ) -> Iterator[tuple[float, Candidate]]:
        present = {name: int(getattr(self._shape, name)) for name in names}
        for row, (parameters, active, memory, usage) in zip(
            table.tolist(), self._costs(names, table).tolist(), strict=True
        ):
            sizes = dict(zip(names, row, strict=True))
            candidate = Candidate(
                original=self._shape,
                changed={name: size for name, size in sizes.items() if size != present[name]},
                parameters=int(parameters),
                active_parameters=int(active),
                memory_bytes=round(memory),
                target=self._target,
            )
            yield usage, candidate

    def _costs(self, names: list[str], table: NDArray[np.int64]) -> NDArray[np.float64]:
        """Parameters, active ones, bytes and use of the tightest limit, ``[points, 4]``."""
        result = np.zeros((len(table), 4))
        fixed = [name for name in names if name in {"experts", "layers"}]
        columns = [names.index(name) for name in fixed]
        groups = np.unique(table[:, columns], axis=0) if fixed else np.zeros((1, 0), int)
        for group in groups:
            rows = np.nonzero((table[:, columns] == group).all(axis=1))[0]
            sizes: dict[str, Any] = {n: table[rows, i] for i, n in enumerate(names)}
            sizes |= dict(zip(fixed, group.tolist(), strict=True))
            pruned = resized(self._shape, sizes)
            result[rows, 0] = pruned.parameters
            result[rows, 1] = pruned.active_parameters
            result[rows, 2] = self._budget.bytes_of(pruned)
            for name, cost in self._budget.values(pruned).items():
                used = cost / self._limits[name]
                result[rows, 3] = np.maximum(result[rows, 3], used)
        return result

    def _nothing(self) -> ModelError:
        points = prod(len(sizes) for sizes in self._grid.values())
        if not np.isfinite(list(self.least.values())).all():
            worst = max(self._refusals, key=lambda name: self._refusals[name])
            rule = next(rule for rule, _ in self._rules if rule.name == worst)
            return ModelError(
                f"none of the {points:,} combinations of sizes is legal for {self._target}",
                hint=f"most break {worst}: {rule.what}; offer other sizes",
            )
        wanted = " and ".join(f"at most {amount(n, v)}" for n, v in self._limits.items())
        least = " and ".join(amount(n, v) for n, v in self.least.items())
        return ModelError(
            f"none of the {points:,} combinations of sizes has {wanted}",
            hint=f"the least that they reach is {least}: raise the budget, or offer smaller sizes "
            "or another axis",
        )
