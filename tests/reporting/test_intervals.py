import math
import random

import pytest
from scipy import stats

from trt_kd.measuring.statistics import mean_interval, t_quantile
from trt_kd.reporting.intervals import (
    Z,
    mcnemar,
    paired_difference_interval,
    paired_ratio,
    ratio_of,
    wilson_interval,
)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 31, 100, 999])
def test_student_t_agrees_with_scipy(degrees):
    assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-10)


@pytest.mark.parametrize(
    ("gained", "lost"), [(0, 0), (3, 12), (12, 3), (7, 7), (0, 30), (200, 260)]
)
def test_mcnemar_is_the_binomial_test_of_discordant_items(gained, lost):
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected)


@pytest.mark.parametrize(("right", "n"), [(0, 10), (7, 10), (10, 10), (600, 1000)])
def test_wilson_agrees_with_scipy(right, n):
    expected = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert wilson_interval(right, n) == pytest.approx((expected.low, expected.high))


def test_mean_interval_agrees_with_scipy():
    values = [1.0, 2.5, 2.0, 4.0]
    expected = stats.t.interval(0.95, 3, loc=2.375, scale=stats.sem(values))
    assert mean_interval(values) == pytest.approx(expected)


@pytest.mark.parametrize("n", [1, 40, 2000])
def test_score_interval_without_discordant_items_has_its_closed_form(n):
    reach = Z**2 / (n + Z**2)
    assert paired_difference_interval(0, 0, n) == pytest.approx((-reach, reach))


@pytest.mark.parametrize(
    ("gained", "lost", "n"), [(3, 12, 100), (0, 9, 50), (50, 0, 50), (1, 1, 2)]
)
def test_score_interval_holds_the_difference_and_mirrors_when_swapped(gained, lost, n):
    low, high = paired_difference_interval(gained, lost, n)
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    mirrored = paired_difference_interval(lost, gained, n)
    assert mirrored == pytest.approx((-high, -low), abs=1e-9)


def test_score_interval_nears_the_wald_interval_for_many_items():
    gained, lost, n = 5000, 6000, 100_000
    difference = (gained - lost) / n
    reach = Z * math.sqrt((gained + lost) / n - difference**2) / math.sqrt(n)
    found = paired_difference_interval(gained, lost, n)
    assert found == pytest.approx((difference - reach, difference + reach), abs=2e-5)


def test_score_interval_covers_the_truth_about_as_often_as_it_says():
    source, covered = random.Random(0), 0
    for _ in range(400):
        draws = [source.random() for _ in range(120)]
        gained, lost = sum(x < 0.10 for x in draws), sum(0.10 <= x < 0.25 for x in draws)
        low, high = paired_difference_interval(gained, lost, 120)
        covered += low <= -0.05 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_paired_ratio_of_proportional_values_has_no_error():
    ratio, stderr = paired_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (ratio, stderr) == pytest.approx((2.0, 0.0))


def test_independent_ratio_follows_the_delta_method():
    assert ratio_of((2.0, 0.2), (4.0, 0.4)) == pytest.approx((0.5, 0.5 * math.hypot(0.1, 0.1)))


def test_a_ratio_to_nothing_is_refused():
    with pytest.raises(ValueError, match="positive"):
        ratio_of((1.0, 0.1), (0.0, 0.1))
    with pytest.raises(ValueError, match="positive"):
        paired_ratio([1.0, 2.0], [0.0, 0.0])
    with pytest.raises(ValueError, match="degree"):
        t_quantile(0)
