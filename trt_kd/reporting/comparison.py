"""Two variants of one benchmark: the ratio of their times, with its interval, run by run.

Each round of an interleaved benchmark gives one pair of run-level numbers; the ratio's interval is
the t interval of the logs of those pairs, so that drift which meets both cancels.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trt_kd.artifacts import Artifact
from trt_kd.errors import ConfigError
from trt_kd.measuring.statistics import CONFIDENCE, ratio_interval
from trt_kd.reporting.evidence import read_lines, read_runs

METRICS = ("ttft_ms", "itl_ms", "output_tokens_per_s")
_PERCENTILE = "p50"


@dataclass(frozen=True)
class Ratio:
    """How many times larger a number of the candidate is than the baseline's."""

    metric: str
    """Of ``METRICS``; the median of a run, or its throughput."""
    batch_size: int
    input_tokens: int
    output_tokens: int
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    """Ends of the interval."""
    confidence: float = CONFIDENCE
    pairs: int = 0
    """Rounds that both variants ran."""
    steady: bool = True
    """False where the runs of one of them spread beyond the benchmark's limit: no verdict."""
    reason: str = ""
    """Why there is no ratio."""


def compare(made: Artifact, baseline: str, candidate: str) -> list[Ratio]:
    """Ratios of ``candidate`` to ``baseline`` by workload and metric.

    Raises:
        ConfigError: if the benchmark has no such variant.
        ArtifactError: if its files are damaged.
    """
    content = json.loads((made.path / "benchmark.json").read_text(encoding="utf-8"))
    records: Mapping[str, list[dict[str, Any]]] = content["variants"]
    for name in (baseline, candidate):
        if name not in records:
            raise ConfigError(
                f"{made.path} did not measure {name}", hint=f"it has {', '.join(records)}"
            )
    numbers = _run_numbers(made)
    found = []
    for below, above in zip(records[baseline], records[candidate], strict=True):
        cell = _cell(below)
        failed = [str(item["error"]) for item in (below, above) if "error" in item]
        steady = all(item.get("steady", True) for item in (below, above))
        for metric in METRICS:
            sides = [numbers.get((n, *cell), {}).get(metric, []) for n in (baseline, candidate)]
            if failed:
                found.append(Ratio(metric, *cell, steady=False, reason=failed[0]))
            elif min(map(len, sides)) < 2:
                reason = "fewer than two rounds, or one token: no interval"
                found.append(Ratio(metric, *cell, steady=steady, reason=reason))
            else:
                interval = ratio_interval(*sides)
                ends = (interval.estimate, interval.low, interval.high, interval.confidence)
                found.append(Ratio(metric, *cell, *ends, pairs=len(sides[0]), steady=steady))
    return found


_Cell = tuple[int, int, int]
"""Batch size, tokens of prompt and answer."""


def _cell(record: Mapping[str, Any]) -> _Cell:
    return int(record["batch_size"]), int(record["input_tokens"]), int(record["output_tokens"])


def _run_numbers(made: Artifact) -> dict[tuple[str, int, int, int], dict[str, list[float]]]:
    """One number per run, in the order of the rounds, by variant and workload, then metric."""
    numbers: dict[tuple[str, int, int, int], dict[str, list[float]]] = {}
    for name, by_size in read_runs(made.path / "samples.jsonl").items():
        for run in (run for runs in by_size.values() for run in runs):
            tokens = len(run.step_s)
            cell = (name, run.batch_size, run.input_tokens or 0, tokens)
            of_run = numbers.setdefault(cell, {})
            for metric in METRICS:
                if tokens > 1 or metric != "itl_ms":
                    of_run.setdefault(metric, []).append(run.metric(metric, _PERCENTILE))
    for line in read_lines(made.path / "reports.jsonl"):
        if line["request_rate"] is None:
            of_run = numbers.setdefault((line["variant"], *_cell(line)), {})
            for metric in METRICS:
                value = line["rates"].get(metric) or line["times"].get(metric, {}).get(_PERCENTILE)
                of_run.setdefault(metric, []).append(float(value))
    return numbers
