"""Candidates under a limit on time: which lane they run in, and what they really take there.

Predictions rank; before anything is spent on a candidate its sizes are timed on the runtime, in
turns with the unpruned model, and those that miss the limit or gain too little are dropped.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from trt_kd.architectures.shape import ModelShape, read_shape
from trt_kd.artifacts import Artifact, piece
from trt_kd.config import build_plugin
from trt_kd.errors import ConfigError, ModelError
from trt_kd.exporters import EXPORTERS
from trt_kd.exporters.base import Exporter
from trt_kd.latency.table import Cell, read_table
from trt_kd.pruning.base import Axis
from trt_kd.pruning.budget import Budget, limited
from trt_kd.pruning.candidates import Candidate, possible
from trt_kd.pruning.latency_limit import LatencyLimit, Stopwatch, costs
from trt_kd.pruning.search import Ranked, name_of, open_axes
from trt_kd.pruning.sensitivity import Point
from trt_kd.pruning.sizes import settled
from trt_kd.registry import Registry
from trt_kd.stages.benchmark import BenchmarkConfig
from trt_kd.stages.corners import (
    Corner,
    Verdict,
    choose_corner,
    corners,
    limits_of,
    told,
    watch_of,
)
from trt_kd.stages.latency import LatencyConfig
from trt_kd.stages.twins import CELLS, SOURCE, Stand, untested_export

if TYPE_CHECKING:
    from trt_kd.stages.prune import PruneConfig

log = logging.getLogger(__name__)

ROUNDS = 4
"""Rounds of candidates that are timed before the search gives up."""


@dataclass(frozen=True)
class Bench:
    """What candidates are timed with: the table's own settings, at the limit's workload."""

    budget: Budget
    """All limits; see ``corrected``."""
    watch: Stopwatch
    """The limits on time and the predictions of the table."""
    lane: Exporter
    settings: LatencyConfig
    source: Artifact
    axes: Sequence[Axis]
    work: Path
    corners: Sequence[Corner]
    verdict: Verdict
    tried: list[dict[str, Any]] = field(default_factory=list)

    @property
    def limit(self) -> LatencyLimit:
        """The limits on time."""
        return self.watch.limit

    def confirm(
        self, found: Sequence[Ranked], rank: Callable[[Budget], Sequence[Ranked]], count: int
    ) -> list[Ranked]:
        """The first ``count`` candidates that keep the limits when measured, best first.

        ``found`` is what ``rank`` lists as taken by ``corrected()``. Where some of it miss the
        limits it is asked again, with predictions corrected by what was measured.

        Raises:
            ModelError: if nothing keeps the limits.
        """
        kept: list[Ranked] = []
        for number in range(ROUNDS):
            if number > 0:
                try:
                    found = rank(self.corrected())
                except ModelError:
                    break
            known = {row["name"] for row in self.tried}
            fresh = [one for one in found if self.name(one.candidate) not in known]
            batch = fresh[: count - len(kept)]
            if not batch:
                break
            verdicts = self._round(number, [one.candidate for one in batch])
            kept += [one for one in batch if verdicts[self.name(one.candidate)]]
            if len(kept) == count:
                break
        if not kept:
            raise self._nothing()
        return sorted(kept, key=lambda one: one.predicted_nats)

    def record(self) -> dict[str, Any]:
        """What was asked, predicted and measured."""
        watch = self.watch
        return {
            "lane": watch.lane,
            **told(self.corners, self.verdict),
            "limit": self.limit.model_dump(mode="json") | watch.lengths._asdict(),
            "limits": watch.limits(),
            "before": watch.before(),
            "prediction_errors": watch.errors(),
            "tried": self.tried,
        }

    def name(self, candidate: Candidate) -> str:
        """Its sizes."""
        return name_of(candidate.shape, open_axes(self.axes))

    def corrected(self) -> Budget:
        """The budget with predictions as far off as the median candidate's was so far."""
        return self.budget.timed_by(replace(self.watch, slower=self._slower()))

    def _slower(self) -> dict[str, float]:
        """How many times more than predicted the candidates took.

        Beside the unpruned model where the limit is a share of its time, else by the clock.
        """
        names = self.tried[0]["measured"] if self.tried else {}
        known = self.watch.slower
        return {
            name: known.get(name, 1.0) * median(self._over(name, one) for one in self.tried)
            for name in names
        }

    def _over(self, name: str, row: Mapping[str, Any]) -> float:
        if self.watch.is_share(name):
            return float(row["over_predicted"][name])
        return float(row["measured"][name] / row["predicted"][name])

    def _round(self, number: int, batch: Sequence[Candidate]) -> dict[str, bool]:
        shapes = {self.name(one): one.shape for one in batch}

        def make(folder: Path) -> Any:
            stand = Stand(self.lane, self.source, self._exported(), self.axes)
            return CELLS.dump_python(stand.time(shapes, self._benchmark(number), folder))

        label = "-".join([str(number), *sorted(shapes)])
        found = CELLS.validate_python(piece(self.work / "timed" / label, make))
        cells = {name: rows[0] for name, rows in found.items()}
        for name, shape in shapes.items():
            self.tried.append(self._judged(name, shape, cells))
        return {row["name"]: row["verdict"] == "kept" for row in self.tried}

    def _exported(self) -> Artifact:
        """The unpruned model in the lane, laid out as the candidates are."""
        place = self.work / "unpruned"
        if place.is_dir():
            return Artifact.open(place, expect="export")
        return untested_export(self.lane, self.source, place)

    def _benchmark(self, number: int) -> BenchmarkConfig:
        made = self.settings.benchmark(1000 + number)
        update = {"batch_sizes": (self.limit.batch,), "repeats": 2 * made.repeats}
        return made.model_copy(update=update | self.watch.lengths._asdict())

    def _judged(self, name: str, shape: ModelShape, cells: Mapping[str, Cell]) -> dict[str, Any]:
        """What a candidate took, held against the unpruned model of the same run."""
        measured, before = (self._costs(cells[one]) for one in (name, SOURCE))
        limits = self.watch.limits_beside(before)
        predicted, expected = self.watch.values(shape), self.watch.before()
        speedup = {cost: before[cost] / measured[cost] for cost in measured}
        verdict = "kept"
        if any(measured[cost] > limits[cost] for cost in measured):
            verdict = "over the limit"
        elif min(speedup.values()) < self.limit.min_speedup:
            verdict = f"less than {self.limit.min_speedup:g} times faster"
        return {
            "name": name,
            "predicted": {cost: float(value) for cost, value in predicted.items()},
            "measured": measured,
            "before": before,
            "limits": limits,
            "speedup": speedup,
            "over_predicted": {
                cost: (measured[cost] / before[cost]) / (float(predicted[cost]) / expected[cost])
                for cost in measured
            },
            "verdict": verdict,
        }

    def _costs(self, cell: Cell) -> dict[str, float]:
        percentile = f"p{self.limit.percentile}"
        ms: dict[Any, float] = {"ttft_ms": cell.ttft_ms[percentile]}
        if cell.itl_ms is not None:
            ms["itl_ms"] = cell.itl_ms[percentile]
        return costs(self.limit, ms, self.watch.lengths.output_tokens)

    def _nothing(self) -> ModelError:
        told = "; ".join(f"{row['name']} is {row['verdict']}" for row in self.tried) or "none fits"
        return ModelError(
            f"no candidate keeps the limits on the runtime: {told}",
            hint="raise the limit, open another axis, or let the search cut more of one",
        )


def bench_of(
    config: "PruneConfig",
    latency: Artifact,
    source: Artifact,
    work: Path,
    *,
    points: Sequence[Point] = (),
) -> Bench:
    """Make ready to time candidates, in the lane that the corners speak for.

    Raises:
        ConfigError: if the table is of another model, or several lanes are open without scores.
        ModelError: if nothing keeps the limits, or the unpruned model does.
    """
    if latency.manifest.inputs.get("source") != source.key:
        raise ConfigError(
            f"the latency table in {latency.path} is of another model than {source.path}",
            hint="make one of this model with trt-kd latency-table",
        )
    budget, limit = limited(config.budget)
    table = read_table(latency.path)
    if not points and limit.lane is None and len(table.lanes) > 1:
        raise ConfigError(
            f"the latency table has {len(table.lanes)} lanes: {', '.join(table.lanes)}",
            hint="name one as budget.latency.lane; only a search over several axes can choose",
        )
    if not points and limit.batches is not None:
        raise ConfigError(
            f"budget.latency.batches {limit.batches} leaves a choice, and there are no scores",
            hint="name one as budget.latency.batch; only a search over several axes can choose",
        )
    search = config.searching
    found = corners(budget, table, config.axes, config.target, points=points, search=search)
    limits = limits_of(budget, table)
    for corner in found:
        log.info("%s, %s: %s", corner.where, corner.name, corner.judged)
    verdict = choose_corner(found, limits)
    log.info("%s", verdict.words)
    registry: Registry[Any] = EXPORTERS
    exporter: Any = build_plugin(registry, table.lanes[verdict.lane].lane)
    watch = watch_of(limit, table, verdict, budget)
    return Bench(
        budget=budget,
        watch=watch,
        lane=exporter,
        settings=LatencyConfig.model_validate(latency.manifest.config),
        source=source,
        axes=config.axes,
        work=work,
        corners=found,
        verdict=verdict,
    )


def in_time(
    config: "PruneConfig", latency: Artifact, source: Artifact, work: Path
) -> tuple["PruneConfig", dict[str, Any]]:
    """``config`` with its one open axis at the largest size that is fast enough when measured."""
    bench = bench_of(config, latency, source, work)
    shape = read_shape(source.path)

    def largest(budget: Budget) -> list[Ranked]:
        found = possible(config.axes, shape, budget, config.target)
        return [Ranked(one, -float(one.parameters)) for one in found]

    kept = bench.confirm(largest(bench.corrected()), largest, 1)[0].candidate.shape
    update = {"axes": settled(config.axes, kept), "budget": None}
    return config.model_copy(update=update), bench.record()
