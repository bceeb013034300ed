"""Let loaded variants take turns and keep what each run took."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trt_kd.backends.worker import OutOfMemoryError, Run, Worker
from trt_kd.errors import TrtKdError
from trt_kd.measuring.clock import Workload
from trt_kd.measuring.machine import load_average
from trt_kd.measuring.metrics import of_steps, summarise
from trt_kd.measuring.rounds import Rounds
from trt_kd.measuring.statistics import is_settled

logger = logging.getLogger(__name__)


@dataclass
class Samples:
    """All counted runs of one variant at one workload."""

    runs: list[Run] = field(default_factory=list)
    load_averages: list[float] = field(default_factory=list)
    warmup_s: list[float] = field(default_factory=list)
    """Seconds of the warm-up runs."""
    error: str | None = None
    """Why there is no measurement, such as too little memory."""


def interleave(
    workers: Mapping[str, Worker],
    prompts: Mapping[str, Any],
    rounds: Rounds,
    *,
    tolerance: float,
) -> dict[tuple[str, Workload], Samples]:
    """Run every turn; a workload that fails is recorded as such and the rest goes on.

    Args:
        workers: loaded variants by name.
        prompts: token ids ``[rows, input_tokens]`` by variant, ``rounds.rows`` of them.
        rounds: what is run how often.
        tolerance: see ``is_settled``; what counts as warm.

    Raises:
        TrtKdError: if a variant failed for another reason than memory and no run of it counted.
    """
    from tqdm import tqdm

    found = {(name, load): Samples() for name in workers for load in rounds.workloads}
    failures: dict[str, TrtKdError] = {}

    def is_warm(workload: Workload) -> bool:
        at_work = [found[name, workload] for name in workers]
        return all(each.error or is_settled(each.warmup_s, tolerance) for each in at_work)

    turns = rounds.turns(list(workers), is_warm)
    for turn in tqdm(turns, desc="benchmark", unit="run", disable=None):
        samples = found[turn.key]
        if samples.error is not None:
            continue
        rows = prompts[turn.variant][turn.rows].tolist()
        try:
            run = workers[turn.variant].run(rows, turn.workload.output_tokens)
        except TrtKdError as error:
            samples.error = str(error.args[0])
            size = turn.workload.batch_size
            logger.warning("batch size %d was not measured: %s", size, samples.error)
            if not isinstance(error, OutOfMemoryError):
                failures.setdefault(turn.variant, error)
            continue
        if turn.repeat < 0:
            samples.warmup_s.append(sum(run.step_s))
            continue
        samples.runs.append(run)
        samples.load_averages.append(load_average() or 0.0)
    for name, failure in failures.items():
        if all(each.error is not None for (other, _), each in found.items() if other == name):
            raise failure
    return found


def record(
    samples: Samples, workload: Workload, *, spread_limit: float, tolerance: float
) -> dict[str, Any]:
    """Statistics of one variant at one workload; see ``trt_kd.measuring.metrics``."""
    if samples.error is not None:
        return {"error": samples.error}
    found = summarise([of_steps(run.step_s, workload) for run in samples.runs])
    return found | {
        "steady": found["spread"] <= spread_limit,
        "warmup_rounds": len(samples.warmup_s),
        "warm": is_settled(samples.warmup_s, tolerance),
        "load_average": max(samples.load_averages),
        "peak_memory_bytes": max(run.peak_memory_bytes for run in samples.runs),
    }


def sample_lines(found: Mapping[tuple[str, Workload], Samples]) -> Sequence[dict[str, Any]]:
    """One entry per counted run: seconds of every step, the first with prefill."""
    return [
        {
            "variant": name,
            "batch_size": workload.batch_size,
            "repeat": repeat,
            "step_s": run.step_s,
        }
        for (name, workload), samples in found.items()
        for repeat, run in enumerate(samples.runs)
    ]
