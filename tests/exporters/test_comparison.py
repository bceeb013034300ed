import numpy as np
import pytest
import torch
from torch.nn import functional as F

from trt_kd.exporters.comparison import compare

LOGITS = np.random.default_rng(0).normal(size=(2, 3, 1, 5, 11)).astype(np.float32)


def test_a_model_agrees_with_itself():
    difference = compare(LOGITS[0], LOGITS[0])
    assert (difference.kl_nats, difference.max_abs, difference.top1_agreement) == (0.0, 0.0, 1.0)
    assert difference.tokens == 15


def test_the_kl_is_that_of_torch():
    expected, actual = torch.tensor(LOGITS).double().reshape(2, 15, 11).log_softmax(-1)
    reference = F.kl_div(actual, expected, log_target=True, reduction="batchmean")
    assert compare(LOGITS[0], LOGITS[1]).kl_nats == pytest.approx(float(reference), rel=1e-12)


def test_a_constant_added_to_all_logits_moves_no_prediction():
    difference = compare(LOGITS[0], LOGITS[0] + 3)
    assert difference.kl_nats == pytest.approx(0.0, abs=1e-6)
    assert difference.max_abs == pytest.approx(3.0, abs=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_logit_that_is_no_number_is_infinitely_far(bad, side):
    poisoned = LOGITS.copy()
    poisoned[side, 1, 0, 2, 3] = bad
    assert compare(poisoned[0], poisoned[1]).kl_nats == np.inf


def test_other_shapes_and_nothing_at_all_are_refused():
    with pytest.raises(ValueError, match="do not compare"):
        compare(LOGITS[0], LOGITS[1, :, :, :, :10])
    with pytest.raises(ValueError, match="shorter"):
        compare(LOGITS[0], LOGITS[1, :2])
    with pytest.raises(ValueError, match="no position"):
        compare([], [])
