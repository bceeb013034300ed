"""Successive halving: how rounds shrink, what an interval says, how stable an order is."""

import numpy as np
import pytest
from scipy import stats

from trt_kd.pruning.halving import (
    Tournament,
    compared,
    leader_share,
    order,
    rank_agreement,
)


@pytest.mark.parametrize(
    ("contestants", "expected"),
    [(2, [(2, 3)]), (4, [(4, 3), (2, 6)]), (5, [(5, 3), (3, 6), (2, 12)])],
)
def test_every_round_has_half_the_contestants_and_twice_the_steps(contestants, expected):
    assert Tournament(contestants=contestants, steps=3).rounds(contestants) == expected


def test_no_more_contestants_than_there_are_take_part():
    assert Tournament(contestants=8, steps=1).rounds(3) == [(3, 1), (2, 2)]


def test_one_contestant_is_no_tournament():
    with pytest.raises(ValueError, match="two contestants"):
        Tournament().rounds(1)


def test_text_suffices_for_a_contestant_of_every_round():
    assert Tournament(contestants=4, steps=3, batch_size=2).sequences() == 2 * (3 + 6)


@pytest.fixture
def scattered():
    rng = np.random.default_rng(0)
    return rng.normal(1.0, 0.3, 24), rng.normal(1.2, 0.3, 24)


def test_the_interval_is_that_of_a_paired_t_test(scattered):
    first, second = scattered
    difference = first - second
    half = stats.t.ppf(0.975, 23) * difference.std(ddof=1) / np.sqrt(24)
    found = compared(first, second)
    assert found.difference_nats == pytest.approx(difference.mean())
    assert found.low_nats == pytest.approx(difference.mean() - half)
    assert found.high_nats == pytest.approx(difference.mean() + half)


def test_the_verdict_turns_with_the_sides(scattered):
    first, second = scattered
    assert compared(first, second).verdict == "better"
    assert compared(second, first).verdict == "worse"


def test_a_contestant_is_the_same_as_itself(scattered):
    first, _ = scattered
    assert compared(first, first).verdict == "same"
    assert compared(first, first).difference_nats == 0.0


def test_what_makes_a_block_hard_cancels(scattered):
    first, _ = scattered
    noise = np.random.default_rng(1).normal(0.0, 1e-3, 24)
    assert compared(first, first + 0.01 + noise).verdict == "better"


def test_a_clear_leader_always_leads_and_a_coin_does_not():
    rng = np.random.default_rng(0)
    noise = rng.normal(0.0, 0.1, 40)
    assert leader_share({"a": noise, "b": noise + 1.0}) == 1.0
    even = {"a": noise, "b": rng.permutation(noise)}
    assert 0.3 < leader_share(even) < 0.8


def test_the_one_closest_to_the_teacher_comes_first():
    assert order({"a": np.ones(2), "b": np.zeros(2), "c": np.ones(2)}) == ["b", "a", "c"]


def test_agreement_of_orders_runs_from_minus_one_to_one():
    assert rank_agreement("abcd", "abcd") == pytest.approx(1.0)
    assert rank_agreement("abcd", "dcba") == pytest.approx(-1.0)
    assert rank_agreement("abxc", "cba") == pytest.approx(-1.0)
    assert rank_agreement("ab", "ca") is None
