"""Ways to a limit on time: every lane (at every batch size), unpruned and pruned, and what pays.

The unpruned model in every lane comes first, so that a format that is fast enough by itself is
never passed over for a cut that would only cost.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from trt_kd.architectures.shape import ModelShape
from trt_kd.errors import ModelError
from trt_kd.latency.table import LatencyTable
from trt_kd.pruning.base import Axis
from trt_kd.pruning.budget import Budget, amount, limited
from trt_kd.pruning.candidates import possible
from trt_kd.pruning.catalogue import Target
from trt_kd.pruning.latency_limit import LatencyLimit, Stopwatch, at_most, stopwatch
from trt_kd.pruning.search import Search, name_of, open_axes, ranked
from trt_kd.pruning.sensitivity import Point

UNPRUNED = "unpruned"
NO_SIZES = "no legal sizes"
LOOSER = 1.05
"""Step by which limits that no sizes keep are raised, to show the nearest that pruning gets."""


@dataclass(frozen=True)
class Corner:
    """One way to the limit: a lane, unpruned or with the best sizes that are predicted to fit."""

    lane: str
    name: str
    """``unpruned``, the sizes, or ``no legal sizes`` where nothing can be cut at all."""
    fits: bool
    costs: dict[str, float]
    """By the name of every limit; of the unpruned model measured, else predicted; empty where
    there are no sizes."""
    nats: float | None
    """Divergence from the unpruned model that format and cut add up to; None without scores."""
    batch: int | None = None
    """Batch size, where the limit leaves a choice."""

    @property
    def where(self) -> str:
        """Its lane, and its batch size where there is a choice."""
        return self.lane if self.batch is None else f"{self.lane} at batch size {self.batch}"

    @property
    def words(self) -> str:
        """Its costs, as in ``12.31 ms ITL, 0.208 nats off``."""
        told = [amount(name, cost) for name, cost in self.costs.items()]
        return ", ".join(told if self.nats is None else [*told, f"{self.nats:.3f} nats off"])

    @property
    def judged(self) -> str:
        """The same, and whether it keeps the limits."""
        if not self.costs:
            return "cannot be pruned to the limit"
        return f"{self.words}, {'fits' if self.fits else 'over the limit'}"


@dataclass(frozen=True)
class Verdict:
    """Which corner keeps the limits nearest to the unpruned model, and whether it is pruned."""

    pruning_pays: bool
    lane: str
    name: str
    """``unpruned``, or the sizes."""
    words: str
    """The same in a sentence or two, for a person."""
    batch: int | None = None
    """Its batch size, where the limit leaves a choice."""


class PruningDoesNotPayError(ModelError):
    """A format alone keeps the limits, and no cut is known to stray less."""

    def __init__(self, verdict: Verdict, found: Sequence[Corner]) -> None:
        """``found`` are the corners behind ``verdict``."""
        super().__init__(
            verdict.words,
            hint=f"export it with lane {verdict.lane} and leave out the pruning, or name another "
            "lane as budget.latency.lane",
        )
        self.verdict = verdict
        self.corners = tuple(found)

    @property
    def told(self) -> str:
        """Verdict and corners in a line, for a report."""
        every = "; ".join(f"{one.where}, {one.name}: {one.judged}" for one in self.corners)
        return f"{self.verdict.words[:1].upper()}{self.verdict.words[1:]} ({every})"


def corners(
    budget: Budget,
    table: LatencyTable,
    axes: Sequence[Axis],
    target: Target,
    *,
    points: Sequence[Point] = (),
    search: Search | None = None,
) -> list[Corner]:
    """Every lane (at every batch size) unpruned, then the best of every one pruned to the limits.

    A lane that keeps the limits unpruned is pruned as little as its ``min_speedup`` asks for, to
    show what a cut would cost there; one that no sizes bring to the limits, as near as they get.

    Raises:
        ConfigError: if ``budget`` limits no time, or names a lane that the table lacks.
        ModelError: if nothing in any lane keeps the limits.
    """
    budget, limit = limited(budget)
    made = _Corners(budget, table, axes, target, points, search or Search())
    lanes = [limit.lane] if limit.lane else list(table.lanes)
    plain = [made.unpruned(lane, batch) for lane in lanes for batch in limit.choices]
    pruned, refused = zip(*(made.pruned(corner) for corner in plain), strict=True)
    found = [*plain, *pruned]
    errors = [error for error in refused if error is not None]
    if errors and not any(corner.fits for corner in found):
        raise errors[-1]
    return found


def limits_of(budget: Budget, table: LatencyTable) -> dict[str, float]:
    """Limits by name that are the same in every lane of ``table``.

    Raises:
        ConfigError: if ``budget`` limits no time, or names a lane that the table lacks.
    """
    budget, limit = limited(budget)
    lane, batch = limit.lane or next(iter(table.lanes)), limit.choices[0]
    return budget.timed_by(stopwatch(limit.at(batch), table, lane)).limits(table.shape)


def watch_of(
    limit: LatencyLimit, table: LatencyTable, verdict: Verdict, budget: Budget
) -> Stopwatch:
    """The limit on time where ``verdict`` says."""
    watch = stopwatch(limit.at(verdict.batch), table, verdict.lane)
    return as_measured(budget, watch, table.shape)


@dataclass(frozen=True)
class _Corners:
    budget: Budget
    table: LatencyTable
    axes: Sequence[Axis]
    target: Target
    points: Sequence[Point]
    search: Search

    def unpruned(self, lane: str, batch: int | None) -> Corner:
        """The unpruned model in ``lane``, as it was measured."""
        watch, shape = self._watch(lane, batch), self.table.shape
        within = self.budget.timed_by(watch)
        costs = within.values(shape) | watch.before()
        limits = within.limits(shape)
        fits = all(cost <= limits[name] for name, cost in costs.items())
        return Corner(lane, UNPRUNED, fits, costs, self.table.lanes[lane].kl_nats, batch)

    def pruned(self, plain: Corner) -> tuple[Corner, ModelError | None]:
        """The lane of ``plain`` pruned to the limits, or as near to them as it gets and why."""
        watch = self._watch(plain.lane, plain.batch)
        limits = watch.limits()
        if plain.fits:
            asked = {name: ms / watch.limit.min_speedup for name, ms in watch.before().items()}
            return self._nearest(plain, asked)
        found, error = self._nearest(plain, limits)
        slower = error
        while slower is not None and self._may_loosen(limits, watch.before()):
            limits = {name: LOOSER * ms for name, ms in limits.items()}
            found, slower = self._nearest(plain, limits)
        return (found if error is None else replace(found, fits=False)), error

    def _may_loosen(self, limits: dict[str, float], before: dict[str, float]) -> bool:
        return any(LOOSER * limits[name] < before[name] for name in before)

    def _nearest(self, plain: Corner, ms: dict[str, float]) -> tuple[Corner, ModelError | None]:
        """The best sizes that take at most ``ms`` by name, or that there are none and why."""
        try:
            return self._best(plain, ms), None
        except ModelError as error:
            return Corner(plain.lane, NO_SIZES, False, {}, None, plain.batch), error

    def _best(self, plain: Corner, ms: dict[str, float]) -> Corner:
        watch, shape = self._watch(plain.lane, plain.batch), self.table.shape
        watch = replace(watch, limit=at_most(watch.limit, ms))
        watch = _scaled(watch, shape) if plain.fits else as_measured(self.budget, watch, shape)
        within = self.budget.timed_by(watch)
        found = possible(self.axes, shape, within, self.target, slack=self.search.slack)
        best, nats, opened = found[0], None, open_axes(self.axes)
        if self.points:
            first = ranked(found, self.points, opened, self.search)[0]
            best, nats = first.candidate, first.predicted_nats + (plain.nats or 0.0)
        costs = {name: float(value) for name, value in within.values(best.shape).items()}
        return Corner(plain.lane, name_of(best.shape, opened), True, costs, nats, plain.batch)

    def _watch(self, lane: str, batch: int | None) -> Stopwatch:
        _, limit = limited(self.budget)
        return stopwatch(limit.at(batch), self.table, lane)


def as_measured(budget: Budget, watch: Stopwatch, shape: ModelShape) -> Stopwatch:
    """``watch``, scaled where the unpruned ``shape`` is predicted to keep what it measured over.

    All predictions are then taken to be as far off as that one.
    """
    return _scaled(watch, shape) if budget.timed_by(watch).fits(shape, shape) else watch


def _scaled(watch: Stopwatch, shape: ModelShape) -> Stopwatch:
    """``watch`` with predictions that are as far off as that of the unpruned model."""
    predicted = replace(watch, slower={}).values(shape)
    slower = {name: ms / float(predicted[name]) for name, ms in watch.before().items()}
    return replace(watch, slower=slower)


def verdict_of(found: Sequence[Corner], limits: dict[str, float]) -> Verdict:
    """Whether pruning pays: which of ``found`` keeps the limits and strays least.

    Ties go to the corner that comes first, so to an unpruned one.

    Args:
        found: what ``corners`` found, of which at least one keeps the limits.
        limits: by the name of every limit, for the sentence.
    """
    known = [corner for corner in found if corner.fits and corner.nats is not None]
    best = min(known, key=lambda one: one.nats or 0.0) if known else _first_fitting(found)
    pays = best.name != UNPRUNED
    words = _pays(best, found, limits) if pays else _does_not_pay(best, found, limits)
    return Verdict(pays, best.lane, best.name, words, best.batch)


def _first_fitting(found: Sequence[Corner]) -> Corner:
    return next(corner for corner in found if corner.fits)


def _pays(best: Corner, found: Sequence[Corner], limits: dict[str, float]) -> str:
    plain = [corner for corner in found if corner.name == UNPRUNED]
    told = "; ".join(f"{one.where} {one.words}" for one in plain)
    near = [one for one in plain if one.fits]
    if near:
        why = f"unpruned {told}, of which {_joined(near)} keeps {_words_of(limits)} but strays "
        why += "further"
    else:
        why = f"no lane keeps {_words_of(limits)} unpruned ({told})"
    return (
        f"pruning pays: {why}; {best.where} with {best.name} is predicted at {best.words}"
        f"{' before any training' if best.nats is not None else ''}"
    )


def _does_not_pay(best: Corner, found: Sequence[Corner], limits: dict[str, float]) -> str:
    alone = f"the format alone keeps {_words_of(limits)} in the lane {best.where}, at {best.words}"
    cut = [one for one in found if one.fits and one.name != UNPRUNED]
    if any(one.nats is None for one in cut):
        return f"pruning is not needed: {alone}; what a cut would cost is not known without scores"
    words = f"pruning does not pay: {alone}"
    if cut:
        nearest = min(cut, key=lambda one: one.nats or 0.0)
        words += f"; the best that is pruned, {nearest.where} with {nearest.name}, is predicted at "
        words += f"{nearest.words} before any training"
    return words


def _joined(found: Sequence[Corner]) -> str:
    return " and ".join(one.where for one in found)


def _words_of(limits: dict[str, float]) -> str:
    return f"the limit of {' and '.join(amount(name, value) for name, value in limits.items())}"


def choose_corner(found: Sequence[Corner], limits: dict[str, float]) -> Verdict:
    """The verdict where pruning pays.

    Raises:
        PruningDoesNotPayError: if the corner that keeps the limits and strays least is unpruned.
    """
    verdict = verdict_of(found, limits)
    if not verdict.pruning_pays:
        raise PruningDoesNotPayError(verdict, found)
    return verdict


def told(found: Sequence[Corner], verdict: Verdict) -> dict[str, Any]:
    """Both, for a program to read."""
    return {
        "verdict": asdict(verdict),
        "corners": [asdict(corner) for corner in found],
    }
