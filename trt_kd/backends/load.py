"""Runtimes that a tool of their own loads with requests and times: what it gets, what it answers.

Such a tool has a clock of its own and tells percentiles of a run, not steps. A run is a process of
its own and the unit of replication: records hold medians over runs of each run's percentiles.
"""

import logging
import math
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from pydantic import PositiveFloat, PositiveInt

from trt_kd.artifacts import Finished
from trt_kd.config import Plugin
from trt_kd.errors import MissingDependencyError, TrtKdError
from trt_kd.measuring.clock import Workload
from trt_kd.measuring.gpu import GpuWatch, gpu_record, gpu_use
from trt_kd.measuring.metrics import RATES, summarise_rates
from trt_kd.measuring.statistics import PERCENTILES, mean_interval, median

logger = logging.getLogger(__name__)

SHARES = tuple(f"p{share}" for share in PERCENTILES)
TIMES = ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms")
LEAST_HEADROOM = 3.0
"""A client that is not this many times faster than the server is part of what it measures."""


@dataclass(frozen=True)
class Load:
    """Requests of one run and how they arrive."""

    workload: Workload
    """Lengths, and as ``batch_size`` the requests that are in flight at once."""
    request_rate: float | None = None
    """Requests per second, arriving at random (Poisson), however many are in flight; None keeps
    ``batch_size`` in flight."""
    prompts: Sequence[Sequence[int]] = ()
    """Token ids, no two rows alike; the warm-up's rows come first."""


@dataclass(frozen=True)
class LoadRun:
    """What a tool told of one run."""

    times: Mapping[str, Mapping[str, float]]
    """p50, p90 and p99 of each of ``TIMES`` over requests."""
    rates: Mapping[str, float | None]
    """Those of ``trt_kd.measuring.metrics.RATES``."""
    report: Mapping[str, Any]
    """The tool's own summary, whole."""
    goodput_requests_per_s: float | None = None
    """Requests per second that met every limit; None where no limit was given."""
    span_s: Sequence[float] | None = None
    """When the requests that count began and ended, since 1970; None if not told."""
    gpu: dict[str, Any] | None = None
    """See ``trt_kd.measuring.gpu.gpu_use``; None where no GPU was watched."""

    def watched(self, watch: GpuWatch | None) -> "LoadRun":
        """The same with what ``watch``, by the time of day, saw while the requests ran."""
        if watch is None or self.span_s is None:
            return self
        start_s, end_s = self.span_s
        return replace(self, gpu=gpu_use(watch.between(start_s, end_s), start_s, end_s))


@dataclass
class Runs:
    """All runs of one variant under one load."""

    runs: list[LoadRun] = field(default_factory=list)
    error: str | None = None
    """Why there is no measurement."""
    client_headroom: float | None = None
    """How many times this rate the client reaches without a model; None if not known."""


class LoadGenerator(Plugin, ABC):
    """A tool, its options, and how to read its answer."""

    definitions: ClassVar[Mapping[str, str]] = {}
    """Names of ``DEFINITIONS`` that this tool means otherwise."""
    request_rates: tuple[PositiveFloat, ...] = ()
    """Further loads: requests per second."""
    requests_per_slot: PositiveInt = 10
    """Requests of one run for each that is in flight at once."""
    requests_at_rate: PositiveInt = 100
    """Requests of one run at a request rate."""
    timeout_s: PositiveFloat = 3600.0
    """Seconds that one run may take."""

    @abstractmethod
    def check(self, targets: Mapping[str, Path], loads: Sequence[Load]) -> None:
        """Refuse what cannot be measured, before anything is; loads have no prompts yet.

        Raises:
            TrtKdError: if the tool is not installed, the server is down or a load has no effect.
        """

    @abstractmethod
    def run(self, target: Path, load: Load, folder: Path) -> LoadRun:
        """Measure once; files of the tool go into the empty ``folder``.

        Raises:
            OutOfMemoryError: if there is too little memory for this load.
            TrtKdError: if the tool fails or its answer is not what was asked.
        """

    def run_without_model(self, target: Path, load: Load, folder: Path) -> LoadRun | None:
        """The same run where nothing is computed, which tells what the client can do at most.

        None where no client stands between, where the load sets the rate, or if not wanted.

        Raises:
            TrtKdError: if the tool fails.
        """
        return None

    def serves_here(self) -> bool:
        """Whether the model runs on this machine, whose GPUs can be watched."""
        return True

    def tokenizer_folder(self, target: Path) -> Path:
        """Where the tokenizer of ``target`` lies."""
        return target

    def limits(self) -> Mapping[str, float]:
        """Milliseconds by the names of ``TIMES`` that a request must keep to be good."""
        return {}

    def loads(self, workloads: Sequence[Workload]) -> list[Load]:
        """One for every workload and for every request rate."""
        one = workloads[0].model_copy(update={"batch_size": 1})
        return [Load(each) for each in workloads] + [Load(one, rate) for rate in self.request_rates]

    def requests(self, load: Load) -> int:
        """Requests of one run that count."""
        if load.request_rate is not None:
            return self.requests_at_rate
        return self.requests_per_slot * load.workload.batch_size

    def warmup(self, load: Load) -> int:
        """Requests of one run that do not count: two for each in flight, ten at a rate."""
        return 10 if load.request_rate is not None else 2 * load.workload.batch_size


@dataclass(frozen=True)
class Workplace:
    """Where a sweep puts files."""

    folder: Path
    """The tool's own, of one run at a time."""
    finished: Finished | None = None
    """Loads that were measured before a kill; one that failed is measured again."""
    watch: GpuWatch | None = None
    """What looks at the GPUs meanwhile."""

    def recall(self, number: int, at_load: Mapping[str, Runs]) -> bool:
        """Fill in the runs of a load that was measured before; whether it was."""
        kept = self.finished.get(f"load-{number}") if self.finished else None
        if kept is None:
            return False
        for name, runs in at_load.items():
            runs.runs.extend(LoadRun(**run) for run in kept[name]["runs"])
            runs.client_headroom = kept[name]["client_headroom"]
        return True

    def keep(self, number: int, at_load: Mapping[str, Runs]) -> None:
        """Keep the runs of a load that did not fail."""
        if self.finished and all(runs.error is None for runs in at_load.values()):
            self.finished.keep(f"load-{number}", {n: asdict(runs) for n, runs in at_load.items()})


def _turns(names: Sequence[str], repeats: int) -> Iterator[tuple[int, str]]:
    for repeat in range(repeats):
        yield from ((repeat, name) for name in (names if repeat % 2 == 0 else reversed(names)))


def _run(
    generator: LoadGenerator, target: Path, load: Load, place: Workplace, runs: Runs
) -> TrtKdError | None:
    """Run once in the emptied folder; keep what was told, or return what went wrong."""
    folder = place.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        runs.runs.append(generator.run(target, load, folder).watched(place.watch))
    except MissingDependencyError:
        raise  # what was written stays for the command of the error
    except TrtKdError as error:
        runs.error = str(error.args[0])
        logger.warning("%s was not measured: %s", target.name, runs.error)
        shutil.rmtree(folder)
        return error
    except BaseException:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
    return None


def _run_client(
    generator: LoadGenerator, target: Path, load: Load, folder: Path, runs: Runs
) -> None:
    """Fill in how much faster the client alone is; a run that fails leaves that open."""
    folder.mkdir(parents=True)
    try:
        alone = generator.run_without_model(target, load, folder)
    except TrtKdError as error:
        logger.warning("the client's headroom is not known: %s", error.args[0])
        alone = None
    finally:
        shutil.rmtree(folder)
    if alone is None:
        return
    rate = median([run.rates["output_tokens_per_s"] or 0.0 for run in runs.runs])
    runs.client_headroom = (alone.rates["output_tokens_per_s"] or 0.0) / rate
    if runs.client_headroom < LEAST_HEADROOM:
        logger.warning(
            "the client reaches only %.1f times this rate without a model: it is part of what was "
            "measured, and no gate uses it",
            runs.client_headroom,
        )


def gpu_watch(generator: LoadGenerator) -> AbstractContextManager[GpuWatch | None]:
    """A watch by the time of day on the GPUs that serve; None where they are another machine's."""
    if generator.serves_here():
        return GpuWatch(time.time)
    logger.info("what is measured runs on another machine: its GPUs are not watched")
    return nullcontext()


def sweep(
    generator: LoadGenerator,
    targets: Mapping[str, Path],
    prompts: Mapping[str, Any],
    loads: Sequence[Load],
    *,
    repeats: int,
    place: Workplace,
) -> dict[str, list[Runs]]:
    """Measure every variant under every load, in ABBA order; a load that fails is recorded.

    Args:
        generator: the tool.
        targets: directories of the variants by name.
        prompts: token ids ``[rows, tokens]`` by variant, see ``rows_needed``, as long as the
            longest prompt; shorter ones are their beginnings.
        loads: from the first to the last.
        repeats: runs of each.
        place: where files lie meanwhile.

    Raises:
        MissingDependencyError: if the tool is not installed; ``place.folder`` stays.
        TrtKdError: if nothing at all was measured of a variant.
    """
    found = {name: [Runs() for _ in loads] for name in targets}
    first: dict[str, TrtKdError] = {}
    used = 0
    for number, load in enumerate(loads):
        size = generator.warmup(load) + generator.requests(load)
        at_load = {name: found[name][number] for name in targets}
        measured = place.recall(number, at_load)
        for repeat, name in [] if measured else _turns(list(targets), repeats):
            if at_load[name].error is None:
                start = used + repeat * size
                rows = prompts[name][start : start + size, : load.workload.input_tokens].tolist()
                with_rows = replace(load, prompts=rows)
                error = _run(generator, targets[name], with_rows, place, at_load[name])
                first |= {} if error is None or name in first else {name: error}
                if repeat == repeats - 1 and error is None:
                    _run_client(generator, targets[name], with_rows, place.folder, at_load[name])
        used += repeats * size
        if not measured:
            place.keep(number, at_load)
    for name, failure in first.items():
        if all(runs.error is not None for runs in found[name]):
            raise failure
    return found


def rows_needed(generator: LoadGenerator, loads: Sequence[Load], repeats: int) -> int:
    """Prompts that a sweep takes."""
    return repeats * sum(generator.warmup(load) + generator.requests(load) for load in loads)


def load_record(runs: Runs, *, spread_limit: float) -> dict[str, Any]:
    """Medians over runs, with t intervals of their logs."""
    if runs.error is not None:
        return {"error": runs.error}
    found: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    for name in TIMES:
        by_share = {share: [run.times[name][share] for run in runs.runs] for share in SHARES}
        found[name] = {share: median(values) for share, values in by_share.items()}
        if len(runs.runs) > 1:
            intervals[name] = {share: _log_interval(values) for share, values in by_share.items()}
    good = [run.goodput_requests_per_s for run in runs.runs]
    known = [value for value in good if value is not None]
    found |= summarise_rates([{name: run.rates.get(name) for name in RATES} for run in runs.runs])
    spans = [run.span_s for run in runs.runs if run.span_s is not None]
    if len(spans) == len(runs.runs):
        rates = [run.rates["output_tokens_per_s"] or 0.0 for run in runs.runs]
        tokens = [rate * (end - start) for rate, (start, end) in zip(rates, spans, strict=True)]
        found |= gpu_record([run.gpu for run in runs.runs], fmean(tokens))
    return found | {
        "goodput_requests_per_s": median(known) if known else None,
        "client_headroom": runs.client_headroom,
        "intervals": intervals,
        "steady": found["spread"] <= spread_limit,
    }


def _log_interval(values: Sequence[float]) -> list[float] | None:
    if min(values) <= 0:
        return None
    return [math.exp(end) for end in mean_interval([math.log(value) for value in values])]
