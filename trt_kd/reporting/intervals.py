"""Confidence intervals behind the gates, in plain arithmetic: no scipy on a serving machine.

Sources: Wilson 1927 (one proportion); Tango 1998, Statistics in Medicine 17:891 (difference of
paired proportions, score interval); McNemar 1947 in its exact form; Abramowitz and Stegun
26.7.3 and 26.7.4 (Student's t for whole degrees of freedom). Tests compare with scipy.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist, fmean

CONFIDENCE = 0.95
Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)

Interval = tuple[float, float]


def t_quantile(degrees: int) -> float:
    """Two-sided 95 % quantile of Student's t with ``degrees`` degrees of freedom."""
    if degrees < 1:
        raise ValueError(f"Student's t needs at least one degree of freedom, got {degrees}")
    angle = _bisect(lambda theta: _t_central(theta, degrees) - CONFIDENCE, 0.0, math.pi / 2)
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


def mean_interval(values: Sequence[float]) -> Interval:
    """T interval of a mean; needs two values."""
    n, mean = len(values), fmean(values)
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    half = t_quantile(n - 1) * math.sqrt(variance / n)
    return mean - half, mean + half


def normal_interval(value: float, stderr: float) -> Interval:
    """Interval of an estimate with a standard error."""
    return value - Z * stderr, value + Z * stderr


def wilson_interval(successes: int, n: int) -> Interval:
    """Score interval of one proportion."""
    share, z2 = successes / n, Z * Z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> tuple[float, float]:
    """Ratio of the means of paired values and its standard error, linearised.

    Raises:
        ValueError: if the lengths differ, are below 2, or the mean below is not positive.
    """
    n = len(above)
    if n != len(below) or n < 2 or fmean(below) <= 0:
        raise ValueError("a paired ratio needs two or more pairs and a positive denominator")
    ratio = fmean(above) / fmean(below)
    rest = [(a - ratio * b) / fmean(below) for a, b in zip(above, below, strict=True)]
    return ratio, math.sqrt(sum(r * r for r in rest) / (n - 1) / n)


def ratio_of(above: Interval, below: Interval) -> tuple[float, float]:
    """Ratio of two independent estimates, each (value, standard error); value first.

    Raises:
        ValueError: if the denominator is not positive.
    """
    if below[0] <= 0:
        raise ValueError("a ratio needs a positive denominator")
    ratio = above[0] / below[0]
    return ratio, math.hypot(above[1], ratio * below[1]) / below[0]


def paired_difference_interval(gained: int, lost: int, n: int) -> Interval:
    """Tango's score interval of the difference in accuracy over ``n`` paired items.

    ``gained`` items are right only in the first variant, ``lost`` only in the second; the
    difference is (gained - lost) / n.
    """
    difference = (gained - lost) / n

    def score(delta: float) -> float:
        linear = (2 * n - gained + lost) * delta - gained - lost
        root = math.sqrt(max(0.0, linear * linear + 8 * n * lost * delta * (1 - delta)))
        share = (root - linear) / (4 * n)
        variance = n * (2 * share + delta * (1 - delta))
        return (gained - lost - n * delta) / math.sqrt(variance) if variance > 0 else 0.0

    low = -1.0 if difference == -1 else _bisect(lambda d: score(d) - Z, -1.0, difference)
    high = 1.0 if difference == 1 else _bisect(lambda d: score(d) + Z, difference, 1.0)
    return low, high


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar test: a binomial test of the discordant items with p = 1/2."""
    n, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / (1 << n))


def _bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """Root of a monotone ``function`` between ``low`` and ``high``."""
    rising = function(high) > function(low)
    for _ in range(200):
        middle = (low + high) / 2
        if (function(middle) > 0) == rising:
            high = middle
        else:
            low = middle
    return (low + high) / 2
