"""Weights by which a plain mean over tokens becomes the sum of two tasks' means."""

import numpy as np
import pytest

from trt_kd.data.two_tasks import LABEL, RATIONALE, weights

LENGTH, STEP = 12, 4


@pytest.fixture(scope="module")
def tasks():
    """Three steps of four blocks, tasks in turn, of random lengths behind random prompts."""
    random = np.random.default_rng(0)
    found = np.zeros((3 * STEP, LENGTH), dtype=np.int8)
    for number, row in enumerate(found):
        begin, end = np.sort(random.choice(np.arange(1, LENGTH + 1), 2, replace=False))
        row[begin:end] = RATIONALE if number % 2 else LABEL
    return found


@pytest.mark.parametrize("share", [0.25, 1.0, 3.0])
def test_a_step_is_the_sum_of_two_means(tasks, share):
    nats = np.random.default_rng(1).random(tasks.shape)
    found = weights(tasks, STEP, share)
    for start in range(0, len(tasks), STEP):
        rows = slice(start, start + STEP)
        label, rationale = (nats[rows][tasks[rows] == one].mean() for one in (LABEL, RATIONALE))
        plain = (found[rows] * nats[rows]).sum() / (found[rows] > 0).sum()
        assert plain == pytest.approx(label + share * rationale, rel=1e-6)


def test_what_is_not_learnt_weighs_nothing_and_everything_else_something(tasks):
    assert np.array_equal(weights(tasks, STEP, 0.5) > 0, tasks > 0)
    assert np.array_equal(weights(tasks, STEP, 0.0) > 0, tasks == LABEL)
    assert set(weights(tasks, STEP, 0.0).flatten()) == {0.0, 1.0}


def test_the_first_token_of_a_block_has_none_before_it_and_counts_nowhere():
    tasks = np.array([[LABEL, LABEL, 0], [0, RATIONALE, 0]], dtype=np.int8)
    assert weights(tasks, 2, 1.0).tolist() == [[0, 2, 0], [0, 2, 0]]
