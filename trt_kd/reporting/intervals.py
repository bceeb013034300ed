"""Confidence intervals behind the gates, in plain arithmetic: no scipy on a serving machine.

Sources: Wilson 1927 (one proportion); Tango 1998, Statistics in Medicine 17:891 (difference of
paired proportions, score interval); McNemar 1947 in its exact form. Student's t stands in
``trt_kd.measuring.statistics``. Tests compare with scipy.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean

from trt_kd.measuring.statistics import CONFIDENCE, root

Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)

Interval = tuple[float, float]


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

    low = -1.0 if difference == -1 else root(lambda d: score(d) - Z, -1.0, difference)
    high = 1.0 if difference == 1 else root(lambda d: score(d) + Z, difference, 1.0)
    return low, high


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar test: a binomial test of the discordant items with p = 1/2."""
    n, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / (1 << n))
