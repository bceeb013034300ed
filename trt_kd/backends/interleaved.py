"""Let loaded variants take turns and keep what each run took."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from trt_kd.artifacts import Finished
from trt_kd.backends.worker import OutOfMemoryError, Run, Worker
from trt_kd.errors import TrtKdError
from trt_kd.measuring.clock import Workload
from trt_kd.measuring.gpu import gpu_record
from trt_kd.measuring.machine import load_average
from trt_kd.measuring.metrics import of_steps, summarise
from trt_kd.measuring.rounds import Rounds, Turn
from trt_kd.measuring.statistics import is_settled

logger = logging.getLogger(__name__)


@dataclass
class Samples:
    """All counted runs of one variant at one workload."""

    runs: list[Run] = field(default_factory=list)
    load_averages: list[float] = field(default_factory=list)
    warmup_s: list[float] = field(default_factory=list)
    """Seconds of the warm-up runs."""
    compile_s: float | None = None
    """Seconds that compiling for the workload took; None where nothing is compiled."""
    error: str | None = None
    """Why there is no measurement, such as too little memory."""


def interleave(
    workers: Mapping[str, Worker],
    prompts: Mapping[str, Any],
    rounds: Rounds,
    *,
    tolerance: float,
    finished: Finished | None = None,
) -> dict[tuple[str, Workload], Samples]:
    """Run every turn; a workload that fails is recorded as such and the rest goes on.

    Args:
        workers: loaded variants by name.
        prompts: token ids ``[rows, tokens]`` by variant, ``rounds.rows`` of them, as long as the
            longest prompt; shorter ones are their beginnings.
        rounds: what is run how often.
        tolerance: see ``is_settled``; what counts as warm.
        finished: where workloads that were measured before a kill are kept; one that failed is
            measured again.

    Raises:
        TrtKdError: if a variant failed for another reason than memory and no run of it counted.
    """
    from tqdm import tqdm

    found = {(name, load): Samples() for name in workers for load in rounds.workloads}
    failures: dict[str, TrtKdError] = {}

    def is_warm(workload: Workload) -> bool:
        at_work = [found[name, workload] for name in workers]
        return all(each.error or is_settled(each.warmup_s, tolerance) for each in at_work)

    with tqdm(desc="benchmark", unit="run", disable=None) as bar:
        for place, workload in enumerate(rounds.workloads):
            known = finished.get(name_of(workload)) if finished else None
            if known is not None:
                found |= {(name, workload): samples_of(known[name]) for name in workers}
                continue
            for name in (each for each in workers if workers[each].compiles):
                rows = prompts[name][: workload.batch_size, : workload.input_tokens].tolist()
                error = _compile(found[name, workload], workload, workers[name], rows)
                _note(failures, name, error)
            for turn in rounds.turns_at(place, list(workers), is_warm):
                rows = prompts[turn.variant][turn.rows, : workload.input_tokens].tolist()
                error = _run(found[turn.key], turn, workers[turn.variant], rows)
                _note(failures, turn.variant, error)
                bar.update()
            measured = {name: found[name, workload] for name in workers}
            if finished and all(each.error is None for each in measured.values()):
                kept = {name: asdict(each) for name, each in measured.items()}
                finished.keep(name_of(workload), kept)
    for name, failure in failures.items():
        if all(each.error is not None for (other, _), each in found.items() if other == name):
            raise failure
    return found


def _note(failures: dict[str, TrtKdError], name: str, error: TrtKdError | None) -> None:
    """Keep the first failure of ``name`` that is not for want of memory."""
    if error is not None and not isinstance(error, OutOfMemoryError):
        failures.setdefault(name, error)


def _compile(
    samples: Samples, workload: Workload, worker: Worker, rows: list[list[int]]
) -> TrtKdError | None:
    """Compile for ``workload`` and keep how long it took; return what went wrong."""
    try:
        samples.compile_s = worker.compile(rows, workload.output_tokens)
    except TrtKdError as error:
        return _failed(samples, workload, error)
    return None


def _failed(samples: Samples, workload: Workload, error: TrtKdError) -> TrtKdError:
    samples.error = str(error.args[0])
    logger.warning("%s was not measured: %s", name_of(workload), samples.error)
    return error


def _run(samples: Samples, turn: Turn, worker: Worker, rows: list[list[int]]) -> TrtKdError | None:
    """Run one turn and keep what it took; return what went wrong the first time."""
    if samples.error is not None:
        return None
    workload = turn.workload
    try:
        run = worker.run(rows, workload.output_tokens)
    except TrtKdError as error:
        return _failed(samples, workload, error)
    if turn.repeat < 0:
        samples.warmup_s.append(sum(run.step_s))
    else:
        samples.runs.append(run)
        samples.load_averages.append(load_average() or 0.0)
    return None


def name_of(workload: Workload) -> str:
    """``batch 4, 128 + 32 tokens``."""
    lengths = f"{workload.input_tokens} + {workload.output_tokens}"
    return f"batch {workload.batch_size}, {lengths} tokens"


def samples_of(kept: Mapping[str, Any]) -> Samples:
    """What ``asdict`` made of samples."""
    return Samples(**{**kept, "runs": [Run(**run) for run in kept["runs"]]})


def record(
    samples: Samples, workload: Workload, *, spread_limit: float, tolerance: float
) -> dict[str, Any]:
    """Statistics of one variant at one workload; see ``trt_kd.measuring.metrics``."""
    if samples.error is not None:
        return {"error": samples.error}
    found = summarise([of_steps(run.step_s, workload) for run in samples.runs])
    tokens = workload.batch_size * workload.output_tokens
    return (
        found
        | gpu_record([run.gpu for run in samples.runs], tokens)
        | {
            "steady": found["spread"] <= spread_limit,
            "warmup_rounds": len(samples.warmup_s),
            "warm": is_settled(samples.warmup_s, tolerance),
            "load_average": max(samples.load_averages),
            "peak_memory_bytes": max(run.peak_memory_bytes for run in samples.runs),
        }
        | ({} if samples.compile_s is None else {"compile_s": samples.compile_s})
    )


def sample_lines(found: Mapping[tuple[str, Workload], Samples]) -> Sequence[dict[str, Any]]:
    """One entry per counted run: seconds of every step, the first with prefill."""
    return [
        {
            "variant": name,
            **workload.model_dump(),
            "repeat": repeat,
            "step_s": run.step_s,
            **({} if run.gpu is None else {"gpu": run.gpu}),
        }
        for (name, workload), samples in found.items()
        for repeat, run in enumerate(samples.runs)
    ]
