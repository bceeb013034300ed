"""What is measured of a run, by definitions that are stored beside the numbers.

Tools disagree on most of these names; what is meant here is written out in ``DEFINITIONS``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from trt_kd.measuring.clock import Workload
from trt_kd.measuring.statistics import (
    PERCENTILES,
    autocorrelation,
    bootstrap_interval,
    coefficient_of_variation,
    half_range,
    median,
    percentiles,
)

DEFINITIONS = {
    "ttft_ms": "send of a request to its first non-empty content; queue and prefill included",
    "itl_ms": "gap between two contents after the first, all gaps of all counted runs pooled",
    "tpot_ms": "(e2e - ttft) / (N - c1) of a request: N output tokens, c1 of them in the first "
    "content; none where N = c1",
    "e2e_ms": "send of a request to its last content",
    "output_tokens_per_s": "output tokens of all requests / whole time, prefill included; median "
    "of runs",
    "input_tokens_per_s": "prompt tokens of all requests / whole time; median of runs",
    "requests_per_s": "requests / whole time; median of runs",
    "tokens_per_s_per_user": "1000 / tpot_ms of a run, generation only; median of runs",
    "energy_j_per_token": "integral of the GPUs' power over the counted runs / output tokens of "
    "all sequences; prefill included",
    "gpu_power_w": "sum over GPUs, mean over samples of a run; mean of runs",
    "gpu_throttled": "share of samples in which the driver names a reason for lower clocks",
    "spread": "half of (largest - smallest) output_tokens_per_s of runs, as a share of the median",
    "intervals": "95 %: percentile bootstrap over whole runs, none for one run",
    "percentile": "linear interpolation between samples",
}
"""Exact meaning of every number of a record; milliseconds and tokens per second."""

RATES = ("output_tokens_per_s", "input_tokens_per_s", "requests_per_s", "tokens_per_s_per_user")


@dataclass(frozen=True)
class RunMetrics:
    """One run of one workload, all its requests sent at once and answered in step."""

    ttft_ms: float
    itl_ms: list[float]
    """Every gap after the first content; empty where one token is asked for."""
    tpot_ms: float | None
    e2e_ms: float
    output_tokens_per_s: float
    input_tokens_per_s: float
    requests_per_s: float
    tokens_per_s_per_user: float | None


def time_per_output_token_ms(
    ttft_ms: float, e2e_ms: float, tokens: int, first_tokens: int = 1
) -> float | None:
    """Milliseconds per token after the first content, which held ``first_tokens``.

    None where the first content was all: such a request says nothing of the rate. Dividing by
    N - 1 instead is wrong where a server flushes several tokens at first or speculates.

    Raises:
        ValueError: if the counts or the times contradict each other.
    """
    if not 1 <= first_tokens <= tokens or e2e_ms < ttft_ms:
        raise ValueError(
            f"{first_tokens} of {tokens} tokens after {ttft_ms} of {e2e_ms} ms cannot be"
        )
    rest = tokens - first_tokens
    return (e2e_ms - ttft_ms) / rest if rest else None


def of_steps(step_s: Sequence[float], workload: Workload) -> RunMetrics:
    """Metrics of a batch that was decoded step by step, one token of every sequence each.

    Raises:
        ValueError: if there are not ``workload.output_tokens`` steps.
    """
    if len(step_s) != workload.output_tokens:
        raise ValueError(f"{len(step_s)} steps are not the workload's {workload.output_tokens}")
    whole_s = sum(step_s)
    ttft_ms, e2e_ms = 1e3 * step_s[0], 1e3 * whole_s
    tpot_ms = time_per_output_token_ms(ttft_ms, e2e_ms, workload.output_tokens)
    return RunMetrics(
        ttft_ms=ttft_ms,
        itl_ms=[1e3 * step for step in step_s[1:]],
        tpot_ms=tpot_ms,
        e2e_ms=e2e_ms,
        output_tokens_per_s=workload.batch_size * workload.output_tokens / whole_s,
        input_tokens_per_s=workload.batch_size * workload.input_tokens / whole_s,
        requests_per_s=workload.batch_size / whole_s,
        tokens_per_s_per_user=1e3 / tpot_ms if tpot_ms else None,
    )


def summarise(runs: Sequence[RunMetrics]) -> dict[str, Any]:
    """Percentiles, rates and spread of runs of one workload; see ``DEFINITIONS``."""
    samples = {
        "ttft_ms": [[run.ttft_ms] for run in runs],
        "itl_ms": [run.itl_ms for run in runs],
        "tpot_ms": [[run.tpot_ms] for run in runs if run.tpot_ms is not None],
        "e2e_ms": [[run.e2e_ms] for run in runs],
    }
    found: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    for name, of_runs in samples.items():
        pooled = [value for values in of_runs for value in values]
        found[name] = percentiles(pooled) if pooled else None
        if pooled and len(runs) > 1:
            intervals[name] = {f"p{p}": bootstrap_interval(of_runs, p) for p in PERCENTILES}
    return found | summarise_rates([_rates(run) for run in runs]) | {"intervals": intervals}


def summarise_rates(runs: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    """Medians and spread of the rates of runs."""
    found: dict[str, Any] = {}
    for name in RATES:
        known = [value for run in runs if (value := run[name]) is not None]
        found[name] = median(known) if known else None
    throughput = [value for run in runs if (value := run["output_tokens_per_s"]) is not None]
    return found | {
        "repeats": len(runs),
        "spread": half_range(throughput),
        "coefficient_of_variation": coefficient_of_variation(throughput),
        "autocorrelation": autocorrelation(throughput),
    }


def _rates(run: RunMetrics) -> dict[str, float | None]:
    return {field.name: getattr(run, field.name) for field in fields(run) if field.name in RATES}
