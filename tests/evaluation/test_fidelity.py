"""Distance from the teacher against closed forms and an independent float64 computation."""

import numpy as np
import pytest
import torch

from trt_kd.evaluation.fidelity import block_scores, joined, mean_and_stderr


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    model = rng.normal(size=(3, 300, 17)).astype(np.float32) * 3
    teacher = rng.normal(size=(3, 300, 17)).astype(np.float32) * 3
    return model, teacher, rng.integers(0, 17, size=(3, 300))


def test_scores_equal_an_independent_float64_computation(logits):
    model, teacher, tokens = logits
    q, p = (torch.from_numpy(x[:, :-1]).double().softmax(-1) for x in (model, teacher))
    kl = (p * (p / q).log()).sum(-1).mean(-1)
    agreement = (q.argmax(-1) == p.argmax(-1)).double().mean(-1)
    targets = torch.from_numpy(tokens[:, 1:])[..., None]
    loss = -q.gather(-1, targets).log().mean((1, 2))

    scores = block_scores(model, teacher, tokens)

    np.testing.assert_allclose(scores.kl_nats, kl, rtol=1e-5)
    np.testing.assert_allclose(scores.top1_agreement, agreement, rtol=1e-12)
    np.testing.assert_allclose(scores.loss_nats, loss, rtol=1e-5)


def test_two_coins_have_the_divergence_of_the_textbook():
    p, q = 0.9, 0.6
    teacher = np.log(np.array([[[p, 1 - p]] * 5]))
    model = np.log(np.array([[[q, 1 - q]] * 5]))
    scores = block_scores(model, teacher, np.zeros((1, 5), dtype=np.int64))
    expected = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert scores.kl_nats[0] == pytest.approx(expected, rel=1e-12)
    assert scores.top1_agreement[0] == 1.0
    assert scores.loss_nats[0] == pytest.approx(-np.log(q), rel=1e-12)


def test_a_model_has_no_distance_from_itself(logits):
    model, _, tokens = logits
    scores = block_scores(model, model, tokens)
    assert scores.kl_nats.tolist() == [0.0] * 3
    assert scores.top1_agreement.tolist() == [1.0] * 3


def test_a_shift_of_all_logits_changes_nothing(logits):
    model, teacher, tokens = logits
    before, after = block_scores(model, teacher, tokens), block_scores(model + 7, teacher, tokens)
    np.testing.assert_allclose(after.kl_nats, before.kl_nats, rtol=1e-4)
    np.testing.assert_allclose(after.loss_nats, before.loss_nats, rtol=1e-4)


def test_the_last_position_predicts_nothing(logits):
    model, teacher, tokens = logits
    changed = model.copy()
    changed[:, -1] = 100.0
    np.testing.assert_array_equal(
        block_scores(changed, teacher, tokens).kl_nats, block_scores(model, teacher, tokens).kl_nats
    )


def test_blocks_do_not_mix(logits):
    whole = block_scores(*logits)
    apart = joined([block_scores(*(x[n : n + 1] for x in logits)) for n in range(3)])
    np.testing.assert_array_equal(whole.kl_nats, apart.kl_nats)
    np.testing.assert_array_equal(whole.loss_nats, apart.loss_nats)


def test_shapes_that_do_not_belong_together_are_refused(logits):
    model, teacher, tokens = logits
    with pytest.raises(ValueError, match="do not belong together"):
        block_scores(model, teacher[:, :, :-1], tokens)
    with pytest.raises(ValueError, match="predicts nothing"):
        block_scores(model[:, :1], teacher[:, :1], tokens[:, :1])


def test_the_standard_error_follows_the_formula():
    values = np.array([1.0, 2.0, 4.0, 5.0])
    mean, error = mean_and_stderr(values)
    assert mean == 3.0
    assert error == pytest.approx(np.sqrt(((values - 3) ** 2).sum() / 3) / 2)


@pytest.mark.parametrize(("right", "of"), [(0, 5), (3, 10), (99, 100)])
def test_the_standard_error_of_an_accuracy_is_the_binomial_one(right, of):
    mean, error = mean_and_stderr(np.array([1.0] * right + [0.0] * (of - right)))
    assert error == pytest.approx(np.sqrt(mean * (1 - mean) / (of - 1)))


def test_one_value_has_no_standard_error_and_none_no_mean():
    assert mean_and_stderr(np.array([2.0])) == (2.0, None)
    with pytest.raises(ValueError, match="nothing"):
        mean_and_stderr(np.array([]))
