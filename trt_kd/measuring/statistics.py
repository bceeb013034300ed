"""Statistics of repeated measurements.

Requests inside one run depend on each other, so runs are the unit of replication: intervals are
computed over one number per run, never over pooled samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PERCENTILES = (50, 90, 99)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99 by linear interpolation, in the unit of ``values``.

    Raises:
        ValueError: if there is no value.
    """
    if not values:
        raise ValueError("percentiles need at least one value")
    found = np.percentile(np.asarray(values, dtype=np.float64), PERCENTILES)
    return {f"p{share}": float(value) for share, value in zip(PERCENTILES, found, strict=True)}


def median(values: Sequence[float]) -> float:
    """Middle value.

    Raises:
        ValueError: if there is no value.
    """
    return percentiles(values)["p50"]


def half_range(values: Sequence[float]) -> float:
    """Spread of runs: half of (largest - smallest), as a share of the median; 0 for one run.

    Raises:
        ValueError: if there is no value or one is not above 0.
    """
    _positive(values)
    return (max(values) - min(values)) / 2 / median(values)


def coefficient_of_variation(values: Sequence[float]) -> float:
    """Sample standard deviation as a share of the mean; 0 for one value.

    Raises:
        ValueError: if there is no value or one is not above 0.
    """
    _positive(values)
    if len(values) == 1:
        return 0.0
    return float(np.std(values, ddof=1) / np.mean(values))


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval."""

    estimate: float
    low: float
    high: float
    confidence: float


def ratio_interval(
    baseline: Sequence[float], candidate: Sequence[float], *, confidence: float = 0.95
) -> Interval:
    """How many times larger ``candidate`` is than ``baseline``, paired by run.

    A t-interval of the mean log ratio: with two numbers of one interleaved run per pair, slow
    drift of the machine cancels. With latencies, a speed-up is the inverse of this ratio.

    Raises:
        ValueError: if there are fewer than two pairs, the lengths differ, a value is not above 0
            or ``confidence`` is not between 0 and 1.
    """
    if len(baseline) != len(candidate) or len(baseline) < 2:
        raise ValueError(
            f"a ratio needs at least two pairs, got {len(baseline)} and {len(candidate)} values"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} must lie between 0 and 1")
    _positive(baseline)
    _positive(candidate)
    logs = np.log(np.asarray(candidate, dtype=np.float64) / np.asarray(baseline))
    mean, error = float(logs.mean()), float(logs.std(ddof=1)) / math.sqrt(len(logs))
    reach = _t_quantile(0.5 + confidence / 2, len(logs) - 1) * error
    return Interval(
        estimate=math.exp(mean),
        low=math.exp(mean - reach),
        high=math.exp(mean + reach),
        confidence=confidence,
    )


def _t_quantile(probability: float, degrees: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(degrees, probability))


def _positive(values: Sequence[float]) -> None:
    if not values or not all(value > 0 and math.isfinite(value) for value in values):
        raise ValueError(f"values must be finite and above 0, got {list(values)[:8]}")
