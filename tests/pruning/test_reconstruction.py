"""The refit of a cut projection: against least squares, on correlated data, within its memory."""

import numpy as np
import pytest
import torch

from trt_kd.architectures import architecture_of
from trt_kd.architectures.hooks import hooks
from trt_kd.errors import ModelError
from trt_kd.pruning.readings import linear_readings, solve_group
from trt_kd.pruning.reconstruction import (
    Reconstruct,
    first_layers,
    gram_bytes,
    in_order,
)
from trt_kd.pruning.ridge import PLAIN, Gram, Moments, refit, solve
from trt_kd.stages.cutting import prune_model
from trt_kd.stages.prune import PruneConfig


def correlated(rng, tokens, channels, rank):
    return rng.normal(size=(tokens, rank)) @ rng.normal(size=(rank, channels)) + 0.1 * rng.normal(
        size=(tokens, channels)
    )


def gram_of(x_TC, length=10):
    """Statistics of tokens ``[T, C]`` that came as sequences of ``length``."""
    gram = Gram()
    for part in torch.from_numpy(x_TC).float().view(-1, length, x_TC.shape[1]).split(3):
        gram.add(part)
    return gram


def test_the_solution_is_that_of_the_augmented_least_squares_problem():
    rng = np.random.default_rng(0)
    x_TC, weight_HC = correlated(rng, 200, 12, 5), rng.normal(size=(4, 12))
    keep, gram = np.array([0, 2, 3, 7, 11]), x_TC.T @ x_TC
    damping = 0.01 * np.diag(gram).mean()
    rows = np.vstack([x_TC[:, keep], np.sqrt(damping) * np.eye(5)])
    target = np.vstack([x_TC @ weight_HC.T, np.sqrt(damping) * weight_HC[:, keep].T])
    expected = np.linalg.lstsq(rows, target, rcond=None)[0].T
    found = solve(
        torch.from_numpy(weight_HC), [Moments(torch.from_numpy(gram))], torch.from_numpy(keep), 0.01
    )
    np.testing.assert_allclose(found.weight.numpy(), expected, rtol=1e-8)


def test_the_residual_is_the_share_of_the_outputs_energy_that_is_lost():
    rng = np.random.default_rng(0)
    x_TC, weight_HC = correlated(rng, 200, 12, 5), rng.normal(size=(4, 12))
    keep = np.array([0, 2, 3, 7, 11])
    found = refit(torch.from_numpy(weight_HC), gram_of(x_TC), torch.from_numpy(keep), [0.01])
    truth = x_TC @ weight_HC.T
    for residual, weight in (
        (found.residual, found.weight.numpy()),
        (found.plain_residual, weight_HC[:, keep]),
    ):
        lost = ((truth - x_TC[:, keep] @ weight.T) ** 2).sum()
        assert residual == pytest.approx(lost / (truth**2).sum(), rel=1e-4)


def test_the_matrix_is_that_of_all_tokens_however_they_are_batched():
    x_TC = np.random.default_rng(0).normal(size=(70, 4))
    np.testing.assert_allclose(gram_of(x_TC).sum.gram.numpy(), x_TC.T @ x_TC, rtol=1e-4, atol=1e-4)
    fit = x_TC.reshape(7, 10, 4)[0::2].reshape(-1, 4)
    np.testing.assert_allclose(
        gram_of(x_TC).halves[0].gram.numpy(), fit.T @ fit, rtol=1e-4, atol=1e-4
    )


def unseen_errors(tokens, channels=32, rank=8):
    """Squared errors on new data of the refit from so many tokens, and of the plain cut."""
    rng = np.random.default_rng(1)
    mix = rng.normal(size=(rank, channels))

    def sample(count):
        noise = rng.normal(size=(count, channels))
        return rng.normal(size=(count, rank)) @ mix + 0.1 * noise

    seen, unseen = sample(tokens), sample(500)
    weight, keep = rng.normal(size=(6, channels)), np.arange(channels // 2)
    found = refit(torch.from_numpy(weight), gram_of(seen), torch.from_numpy(keep), [1e-3, 0.1])
    truth = unseen @ weight.T
    refitted = ((truth - unseen[:, keep] @ found.weight.numpy().T) ** 2).sum()
    return refitted, ((truth - unseen[:, keep] @ weight[:, keep].T) ** 2).sum(), found.ridge


def test_the_refit_beats_the_plain_cut_on_data_it_has_not_seen():
    refitted, plain, ridge = unseen_errors(500)
    assert refitted < 0.2 * plain
    assert ridge < PLAIN


def test_too_few_tokens_leave_the_plain_cut():
    """Channels that have nothing to do with each other: what two sequences share is chance."""
    refitted, plain, ridge = unseen_errors(20, channels=256, rank=256)
    assert ridge == PLAIN
    assert refitted == pytest.approx(plain)


def test_silent_inputs_leave_the_plain_cut():
    weight = torch.randn(3, 6, dtype=torch.float64)
    found = refit(weight, gram_of(np.zeros((40, 6))), torch.tensor([1, 2]), [0.01])
    torch.testing.assert_close(found.weight, weight[:, [1, 2]])
    assert (found.residual, found.plain_residual) == (0.0, 0.0)


def test_one_sequence_is_not_enough_to_check_a_refit():
    with pytest.raises(ModelError, match="needs two sequences of calibration text, found 1"):
        refit(torch.ones(2, 4), gram_of(np.ones((10, 4))), torch.tensor([0, 1]), [0.01])


def errors(make_decoder, blocks, logits, reconstruct):
    model = make_decoder()
    with torch.no_grad():  # with one gate for all, 256 channels lie in the 128 hidden dimensions
        for layer in model.model.layers:
            gate = layer.mlp.gate_proj.weight
            gate.copy_(gate[:1].expand_as(gate))
    before = logits(model, blocks)
    axes = [{"kind": "ffn", "size": 128}]
    config = PruneConfig.model_validate({"axes": axes, "reconstruct": reconstruct})
    measured = prune_model(config, model, blocks)
    return float((logits(model, blocks) - before).square().mean()), measured, model


def test_a_reconstructed_model_is_nearer_to_the_unpruned_one(make_decoder, logits):
    blocks = np.random.default_rng(0).integers(0, 512, (64, 32))
    plain, nothing, _ = errors(make_decoder, blocks, logits, None)
    refitted, measured, _ = errors(make_decoder, blocks, logits, {"ridges": [0.01]})
    assert refitted < 0.1 * plain
    assert "refits" not in nothing
    assert all(each["residual"] < each["plain_residual"] for each in measured["refits"])


def test_groups_bounded_by_memory_give_the_same_model(make_decoder, blocks, logits):
    one_layer_gib = gram_bytes(256) / 2**30
    _, measured, model = errors(make_decoder, blocks, logits, {"memory_gib": 1.5 * one_layer_gib})
    _, together, whole = errors(make_decoder, blocks, logits, {})
    assert measured["refits"] == together["refits"]
    assert torch.equal(logits(model, blocks), logits(whole, blocks))


def test_one_projection_at_a_time_gives_the_same_model_along_several_axes(make_decoder, logits):
    """What is refit already must not show in the matrices of what is still to be refit."""
    blocks = np.random.default_rng(0).integers(0, 512, (16, 32))
    axes = [{"kind": "ffn", "size": 128}, {"kind": "heads", "size": 1}]
    axes.append({"kind": "depth", "layers": 3})
    found = []
    for memory_gib in (1e-9, 1.0):
        model, settings = make_decoder(num_hidden_layers=4), {"memory_gib": memory_gib}
        config = PruneConfig.model_validate({"axes": axes, "reconstruct": settings})
        prune_model(config, model, blocks)
        found.append(logits(model, blocks))
    assert torch.equal(*found)


def test_groups_hold_no_more_than_the_budget():
    settings = Reconstruct(memory_gib=3.5 * gram_bytes(256) / 2**30)
    assert settings.groups([256] * 4) == [[1, 2, 3], [0]]
    assert settings.groups([256, 512, 128]) == [[2], [1], [0]]
    assert Reconstruct(memory_gib=1e-9).groups([256] * 4) == [[3], [2], [1], [0]]


def projections(model):
    """Output and down projections of a decoder, shuffled."""
    architecture = architecture_of(model.config.model_type)
    layers = architecture.layers(model)
    mlps = [mlp.down for mlp in map(architecture.mlp, layers) if mlp is not None]
    return layers, [*mlps[::-1], *(architecture.attention(layer).o for layer in layers)]


def test_projections_are_listed_as_they_run_in_every_family(families):
    for model_type in families.FAMILIES:
        model = families.tiny(model_type)
        layers, found = projections(model)
        ran = []
        with hooks() as hook:
            for module in found:
                hook(module, "input", lambda _, module=module, ran=ran: ran.append(module))
            families.logits(model)
        ordered = in_order(layers, found)
        assert list(ordered) == ran, model_type
        assert list(ordered.values()) == sorted(ordered.values())


def test_the_first_layers_alone_see_what_they_see_in_the_whole_model(make_decoder, blocks, logits):
    model = make_decoder(num_hidden_layers=4)
    layers, found = projections(model)
    consumer, before = list(in_order(layers, found))[3], logits(model, blocks)
    seen, ran = [], []
    with hooks() as hook:
        hook(consumer, "input", seen.append)
        hook(layers[2], "input", ran.append)
        logits(model, blocks)
        with first_layers(layers, 2):
            logits(model, blocks)
    assert torch.equal(*seen)
    assert len(ran) == 1
    assert torch.equal(logits(model, blocks), before)


def test_a_group_is_written_at_once_and_leaves_nothing_behind(make_decoder):
    model = make_decoder()
    consumer = projections(model)[1][0]
    before, x_TC = consumer.weight.clone(), np.random.default_rng(0).normal(size=(400, 256))
    x_TC[:, 100:] = x_TC[:, :156]
    (reading,) = linear_readings(model, architecture_of("llama"), [consumer])
    reading.grams, told = [gram_of(x_TC)], []
    keep = {consumer: torch.arange(100)}
    found = solve_group([reading], keep, [0.01], lambda: told.append(1))
    assert (reading.layer, list(found)) == (3, [reading])
    ((name, found),) = found[reading]
    assert name == "down_proj"
    assert (reading.grams, told, found.weight.numel()) == ([], [1], 0)
    expected = refit(before, gram_of(x_TC), keep[consumer], [0.01])
    assert torch.equal(consumer.weight[:, :100], expected.weight)
    assert torch.equal(consumer.weight[:, 100:], before[:, 100:])
    assert found.residual == expected.residual < 0.5 * expected.plain_residual
