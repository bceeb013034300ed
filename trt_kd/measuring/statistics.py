"""Statistics of repeated measurements, in plain arithmetic: no scipy on a serving machine.

Requests inside one run depend on each other, so runs are the unit of replication: intervals are
computed over one number per run, or by drawing whole runs again, never over pooled samples.

Sources: Abramowitz and Stegun 26.7.3 and 26.7.4 (Student's t for whole degrees of freedom); Efron
and Tibshirani 1993, chapter 13 (percentile bootstrap), whole runs being drawn as clusters. Tests
compare with scipy.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

PERCENTILES = (50, 90, 99)
CONFIDENCE = 0.95
WINDOWS = 3
"""Windows that must agree before something counts as warm."""
_RESAMPLES = 1000


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
    baseline: Sequence[float], candidate: Sequence[float], *, confidence: float = CONFIDENCE
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
    logs = np.log(np.asarray(candidate, dtype=np.float64) / np.asarray(baseline)).tolist()
    low, high = mean_interval(logs, confidence=confidence)
    return Interval(math.exp(fmean(logs)), math.exp(low), math.exp(high), confidence)


def mean_interval(
    values: Sequence[float], *, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """T interval of a mean; needs two values."""
    n, mean = len(values), fmean(values)
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    half = t_quantile(n - 1, confidence=confidence) * math.sqrt(variance / n)
    return mean - half, mean + half


def bootstrap_interval(
    runs: Sequence[Sequence[float]],
    share: float,
    *,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Interval of a percentile of pooled samples; None for one run, which says nothing of others.

    Percentile bootstrap over whole runs: samples of one run stay together. With few runs it is
    narrower than it says, which is why gates take the t interval of run-level numbers instead.

    Args:
        runs: samples of every run; each run has at least one.
        share: percentile, 0 to 100.
        confidence: share of such intervals that hold the percentile.
        seed: of the drawing.
    """
    if len(runs) < 2:
        return None
    random = np.random.default_rng(seed)
    arrays = [np.asarray(run, dtype=np.float64) for run in runs]
    drawn = random.integers(0, len(arrays), (_RESAMPLES, len(arrays)))
    found = [np.percentile(np.concatenate([arrays[i] for i in row]), share) for row in drawn]
    tail = 50 * (1 - confidence)
    low, high = np.percentile(found, [tail, 100 - tail])
    return float(low), float(high)


def autocorrelation(values: Sequence[float]) -> float | None:
    """Correlation of each value with the next one; None for fewer than three or all alike.

    Well above 0, the machine drifts during the measurement; at most 0.1 counts as none.
    """
    if len(values) < 3:
        return None
    rest = np.asarray(values, dtype=np.float64) - np.mean(values)
    power = float(rest @ rest)
    return float(rest[1:] @ rest[:-1]) / power if power > 0 else None


def is_settled(windows: Sequence[float], tolerance: float) -> bool:
    """Whether the last three of ``windows`` lie within ``tolerance`` of their median.

    Raises:
        ValueError: if one of the last is not above 0.
    """
    last = windows[-WINDOWS:]
    if len(last) < WINDOWS:
        return False
    _positive(last)
    middle = median(last)
    return max(abs(value - middle) for value in last) <= tolerance * middle


def t_quantile(degrees: int, *, confidence: float = CONFIDENCE) -> float:
    """Two-sided quantile of Student's t: |T| stays below it with probability ``confidence``."""
    if degrees < 1:
        raise ValueError(f"Student's t needs at least one degree of freedom, got {degrees}")
    angle = root(lambda theta: _t_central(theta, degrees) - confidence, 0.0, math.pi / 2)
    return math.sqrt(degrees) * math.tan(angle)


def _t_central(theta: float, degrees: int) -> float:
    """P(|T| < tan(theta) * sqrt(degrees)), a finite series."""
    cos2, sin = math.cos(theta) ** 2, math.sin(theta)
    odd = degrees % 2
    term = math.cos(theta) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= cos2 * (k - 1) / k
        total += term
    return 2 / math.pi * (theta + sin * total) if odd else sin * total


def root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a monotone ``function`` is 0, between ``low`` and ``high``."""
    rising = function(high) > function(low)
    for _ in range(200):
        middle = (low + high) / 2
        if (function(middle) > 0) == rising:
            high = middle
        else:
            low = middle
    return (low + high) / 2


def _positive(values: Sequence[float]) -> None:
    if not values or not all(value > 0 and math.isfinite(value) for value in values):
        raise ValueError(f"values must be finite and above 0, got {list(values)[:8]}")
