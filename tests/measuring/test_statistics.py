"""Statistics against closed forms, simulation and other libraries."""

import math
import statistics as stdlib

import numpy as np
import pytest

from trt_kd.measuring.statistics import (
    autocorrelation,
    bootstrap_interval,
    coefficient_of_variation,
    half_range,
    is_settled,
    median,
    percentiles,
    ratio_interval,
    t_quantile,
)

VALUES = [3.0, 1.0, 4.0, 1.5, 9.0]


def test_percentiles_interpolate_between_samples():
    assert percentiles([0.0, 10.0]) == pytest.approx({"p50": 5.0, "p90": 9.0, "p99": 9.9})


def test_percentiles_of_one_sample_are_that_sample():
    assert percentiles([7.0]) == {"p50": 7.0, "p90": 7.0, "p99": 7.0}


def test_the_median_is_the_standard_librarys():
    assert median(VALUES) == stdlib.median(VALUES)


def test_spread_is_half_the_range_over_the_median():
    assert half_range(VALUES) == pytest.approx(4.0 / 3.0)


def test_variation_is_deviation_over_mean():
    expected = stdlib.stdev(VALUES) / stdlib.mean(VALUES)
    assert coefficient_of_variation(VALUES) == pytest.approx(expected)


@pytest.mark.parametrize("spread", [half_range, coefficient_of_variation])
def test_spread_has_no_unit_and_one_run_has_none(spread):
    assert spread([1e3 * value for value in VALUES]) == pytest.approx(spread(VALUES))
    assert spread([2.0]) == 0.0


@pytest.mark.parametrize("function", [percentiles, half_range, coefficient_of_variation])
def test_no_value_is_refused(function):
    with pytest.raises(ValueError, match=r"at least one|above 0"):
        function([])


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_spread_refuses_what_no_time_can_be(bad):
    with pytest.raises(ValueError, match="finite and above 0"):
        half_range([1.0, bad])


def test_the_interval_is_scipys_one_sample_t_interval_of_log_ratios():
    stats = pytest.importorskip("scipy.stats")
    other = [2.0, 1.1, 4.4, 1.2, 8.0]
    logs = np.log(other) - np.log(VALUES)
    expected = np.exp(stats.t.interval(0.9, 4, logs.mean(), stats.sem(logs)))
    found = ratio_interval(VALUES, other, confidence=0.9)
    assert (found.low, found.high) == pytest.approx(tuple(expected))
    assert found.estimate == pytest.approx(math.exp(logs.mean()))


def test_the_interval_of_swapped_roles_is_the_inverse():
    one = ratio_interval([1.0, 2.0, 3.0], [2.0, 3.9, 6.3])
    two = ratio_interval([2.0, 3.9, 6.3], [1.0, 2.0, 3.0])
    assert (one.low, one.estimate) == pytest.approx((1 / two.high, 1 / two.estimate))


def test_drift_of_the_machine_cancels_in_pairs():
    drift = np.array([1.0, 2.0, 4.0, 8.0])
    found = ratio_interval(list(drift), list(1.5 * drift))
    assert (found.low, found.high) == pytest.approx((1.5, 1.5))


def test_the_interval_covers_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        base, candidate = np.exp(random.normal(0.0, 0.1, (2, 5)))
        interval = ratio_interval(list(base), list(1.3 * candidate))
        covered += interval.low <= 1.3 <= interval.high
    assert covered / 1000 == pytest.approx(0.95, abs=0.025)


@pytest.mark.parametrize(
    ("baseline", "candidate", "confidence"),
    [([1.0], [1.0], 0.95), ([1.0, 2.0], [1.0], 0.95), ([1.0, 2.0], [1.0, 2.0], 95.0)],
)
def test_a_ratio_without_evidence_is_refused(baseline, candidate, confidence):
    with pytest.raises(ValueError, match=r"pairs|between 0 and 1"):
        ratio_interval(baseline, candidate, confidence=confidence)


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95, 0.99])
@pytest.mark.parametrize("degrees", [1, 2, 5, 40])
def test_student_t_is_scipys_at_every_confidence(degrees, confidence):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.t.ppf(0.5 + confidence / 2, degrees)
    assert t_quantile(degrees, confidence=confidence) == pytest.approx(expected, rel=1e-9)


def test_the_bootstrap_of_single_samples_is_scipys_percentile_bootstrap():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).lognormal(size=40)
    low, high = bootstrap_interval([[value] for value in values], 50)
    expected = stats.bootstrap(
        (values,), np.median, method="percentile", n_resamples=4000, random_state=2
    ).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), rel=0.1)


def test_the_bootstrap_draws_whole_runs():
    runs = [[1.0] * 500, [2.0] * 500, [3.0] * 500]
    assert bootstrap_interval(runs, 50) == (1.0, 3.0)
    pooled = [[value] for run in runs for value in run]
    assert bootstrap_interval(pooled[::10], 50) == (2.0, 2.0)


def test_one_run_says_nothing_of_others():
    assert bootstrap_interval([[1.0, 2.0, 3.0]], 50) is None


def test_autocorrelation_sees_drift_and_alternation():
    assert autocorrelation([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(0.4)
    assert autocorrelation([1.0, 2.0, 1.0, 2.0, 1.0, 2.0]) < -0.5
    assert autocorrelation([1.0, 1.0, 1.0]) is None
    assert autocorrelation([1.0, 2.0]) is None


@pytest.mark.parametrize(
    ("windows", "settled"),
    [
        ([1.0, 1.0], False),
        ([9.0, 1.0, 1.0, 1.019], True),
        ([1.0, 1.0, 1.03], False),
        ([1.0, 1.0, 1.0, 2.0], False),
    ],
)
def test_warm_is_three_windows_that_agree(windows, settled):
    assert is_settled(windows, 0.02) is settled
