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
    """Ratios of ``candidate`` to ``baseline`` by batch size and metric.

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
        size = int(below["batch_size"])
        failed = [str(item["error"]) for item in (below, above) if "error" in item]
        steady = all(item.get("steady", True) for item in (below, above))
        for metric in METRICS:
            sides = [numbers.get((n, size), {}).get(metric, []) for n in (baseline, candidate)]
            if failed:
                found.append(Ratio(metric, size, steady=False, reason=failed[0]))
            elif min(map(len, sides)) < 2:
                reason = "fewer than two rounds, or one token: no interval"
                found.append(Ratio(metric, size, steady=steady, reason=reason))
            else:
                interval = ratio_interval(*sides)
                ends = (interval.estimate, interval.low, interval.high, interval.confidence)
                found.append(Ratio(metric, size, *ends, pairs=len(sides[0]), steady=steady))
    return found


def _run_numbers(made: Artifact) -> dict[tuple[str, int], dict[str, list[float]]]:
    """One number per run, in the order of the rounds, by variant and batch size, then metric."""
    numbers: dict[tuple[str, int], dict[str, list[float]]] = {}
    for name, by_size in read_runs(made.path / "samples.jsonl").items():
        for size, runs in by_size.items():
            several = all(len(run.step_s) > 1 for run in runs)
            kept = [metric for metric in METRICS if several or metric != "itl_ms"]
            numbers[name, size] = {
                metric: [run.metric(metric, _PERCENTILE) for run in runs] for metric in kept
            }
    for line in read_lines(made.path / "reports.jsonl"):
        if line["request_rate"] is None:
            of_run = numbers.setdefault((line["variant"], line["batch_size"]), {})
            for metric in METRICS:
                value = line["rates"].get(metric) or line["times"].get(metric, {}).get(_PERCENTILE)
                of_run.setdefault(metric, []).append(float(value))
    return numbers
