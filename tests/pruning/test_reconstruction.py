"""The refit of a cut projection: against least squares, on correlated data, within its memory."""

import numpy as np
import pytest
import torch

from trt_kd.architectures.shape import shape_from_config
from trt_kd.errors import ModelError
from trt_kd.pruning.reconstruction import Reconstruct, gram_bytes
from trt_kd.pruning.ridge import refit
from trt_kd.stages.prune import PruneConfig, prune_model


def correlated(rng, tokens, channels, rank):
    return rng.normal(size=(tokens, rank)) @ rng.normal(size=(rank, channels)) + 0.1 * rng.normal(
        size=(tokens, channels)
    )


def test_the_refit_solves_the_augmented_least_squares_problem():
    rng = np.random.default_rng(0)
    x_TC, weight_HC = correlated(rng, 200, 12, 5), rng.normal(size=(4, 12))
    keep, gram = np.array([0, 2, 3, 7, 11]), x_TC.T @ x_TC
    damping = 0.01 * np.diag(gram).mean()
    rows = np.vstack([x_TC[:, keep], np.sqrt(damping) * np.eye(5)])
    target = np.vstack([x_TC @ weight_HC.T, np.sqrt(damping) * weight_HC[:, keep].T])
    expected = np.linalg.lstsq(rows, target, rcond=None)[0].T
    solution = refit(
        torch.from_numpy(weight_HC), torch.from_numpy(gram), torch.from_numpy(keep), 0.01
    )
    np.testing.assert_allclose(solution.weight.numpy(), expected, rtol=1e-8)
    lost = ((x_TC @ weight_HC.T - x_TC[:, keep] @ expected.T) ** 2).sum()
    assert solution.residual == pytest.approx(lost / ((x_TC @ weight_HC.T) ** 2).sum(), rel=1e-6)


def test_the_refit_beats_the_plain_cut_on_data_it_has_not_seen():
    rng = np.random.default_rng(1)
    mix = rng.normal(size=(8, 32))
    seen, unseen = (
        rng.normal(size=(500, 8)) @ mix + 0.1 * rng.normal(size=(500, 32)) for _ in range(2)
    )
    weight, keep = rng.normal(size=(6, 32)), np.arange(16)
    solution = refit(
        torch.from_numpy(weight), torch.from_numpy(seen.T @ seen), torch.from_numpy(keep), 0.01
    )
    truth = unseen @ weight.T
    refitted = ((truth - unseen[:, keep] @ solution.weight.numpy().T) ** 2).sum()
    plain = ((truth - unseen[:, keep] @ weight[:, keep].T) ** 2).sum()
    assert refitted < 0.2 * plain


def test_a_heavy_ridge_leaves_the_plain_cut():
    rng = np.random.default_rng(2)
    x, weight = rng.normal(size=(50, 6)), torch.from_numpy(rng.normal(size=(3, 6)))
    solution = refit(weight, torch.from_numpy(x.T @ x), torch.tensor([0, 1, 4]), 1e9)
    torch.testing.assert_close(solution.weight, weight[:, [0, 1, 4]], rtol=1e-6, atol=1e-6)


def test_silent_inputs_leave_the_plain_cut():
    weight = torch.randn(3, 6, dtype=torch.float64)
    solution = refit(weight, torch.zeros(6, 6), torch.tensor([1, 2]), 0.01)
    torch.testing.assert_close(solution.weight, weight[:, [1, 2]])
    assert (solution.residual, solution.plain_residual) == (0.0, 0.0)


def test_a_system_without_a_finite_solution_is_an_error():
    gram = torch.full((4, 4), float("inf"))
    with pytest.raises(ModelError, match="no finite solution"):
        refit(torch.ones(2, 4), gram, torch.tensor([0, 1]), 0.01)


def errors(make_decoder, blocks, logits, reconstruct):
    model = make_decoder()
    before = logits(model, blocks)
    axes = [{"kind": "ffn", "size": 128}]
    config = PruneConfig.model_validate({"axes": axes, "reconstruct": reconstruct})
    measured = prune_model(config, model, blocks)
    return float((logits(model, blocks) - before).square().mean()), measured, model


def test_a_reconstructed_model_is_nearer_to_the_unpruned_one(make_decoder, blocks, logits):
    plain, nothing, _ = errors(make_decoder, blocks, logits, None)
    refitted, measured, _ = errors(make_decoder, blocks, logits, {"ridge": 0.01})
    assert refitted < plain
    assert "reconstruction_residual" not in nothing
    pairs = zip(measured["reconstruction_residual"], measured["plain_residual"], strict=True)
    assert all(after < before for after, before in pairs)


def test_groups_bounded_by_memory_give_the_same_model(make_decoder, blocks, logits):
    one_layer_gib = 4 * 256**2 / 2**30
    _, measured, model = errors(make_decoder, blocks, logits, {"memory_gib": 1.5 * one_layer_gib})
    _, together, whole = errors(make_decoder, blocks, logits, {})
    assert measured["reconstruction_residual"] == together["reconstruction_residual"]
    assert torch.equal(logits(model, blocks), logits(whole, blocks))


def test_groups_hold_no_more_than_the_budget(make_decoder):
    shape = shape_from_config(make_decoder().config.to_dict())
    settings = Reconstruct(memory_gib=3.5 * gram_bytes(shape) / 2**30)
    assert settings.groups(shape) == [[0, 1, 2], [3]]
    assert Reconstruct(memory_gib=1e-9).groups(shape) == [[0], [1], [2], [3]]
