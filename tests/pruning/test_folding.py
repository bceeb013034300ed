"""Folds of dropped layers: kept where they bring the model nearer, dropped where they do not."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from trt_kd.architectures import architecture_of
from trt_kd.pruning.folding import Proof, held_out, samples
from trt_kd.pruning.sequential import Streams, capture
from trt_kd.stages.cutting import prune_model
from trt_kd.stages.prune import PruneConfig

LOUD = 7
"""The token with a massive activation."""


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([4] * 8, [0] * 7 + [4]),
        ([4, 4, 1], [0, 0, 1]),
        ([8, 8, 8, 2], [0, 0, 1, 2]),
        ([2], [0]),
        ([3], [1]),
        ([1, 1, 1], [0, 0, 1]),
        ([100, 2], [2, 2]),
    ],
)
def test_an_eighth_of_the_text_is_held_out_and_two_sequences_are_left(sizes, expected):
    assert held_out(sizes) == expected


def test_ordinary_tokens_count_by_their_norm_and_massive_ones_hold_still():
    rng = torch.Generator().manual_seed(0)
    goal, pruned, inputs = (torch.randn(2, 50, n, generator=rng) for n in (8, 8, 5))
    goal[0, 3] *= 1000.0  # massive in the original
    pruned[1, 4] *= 1000.0  # or in the pruned stream
    weighted, errors = samples(goal, pruned, inputs)
    norm = goal.square().mean(-1, keepdim=True).sqrt()
    ordinary = torch.ones(2, 50, dtype=torch.bool)
    ordinary[0, 3] = ordinary[1, 4] = False
    torch.testing.assert_close(weighted[ordinary], (inputs / norm)[ordinary])
    torch.testing.assert_close(errors[ordinary], ((goal - pruned) / norm)[ordinary])
    assert not errors[~ordinary].any()
    usual = weighted[ordinary].square().mean(-1).sqrt().median()
    sizes = weighted[~ordinary].square().mean(-1).sqrt()
    torch.testing.assert_close(sizes, 10 * usual.expand(2), rtol=0.05, atol=0.0)
    cosines = F.cosine_similarity(weighted[~ordinary], inputs[~ordinary], dim=-1)
    torch.testing.assert_close(cosines, torch.ones(2))


def forward_loop(blocks, model):
    for part in np.array_split(blocks, 4):
        model.base_model(input_ids=torch.from_numpy(part), use_cache=False)


def test_the_projection_with_the_lowest_divergence_on_the_sequences_held_out_is_chosen(
    make_decoder,
):
    """By whole models: every candidate is put into a copy whose third layer is skipped."""
    blocks = np.random.default_rng(0).integers(8, 512, (16, 24))
    model, architecture = make_decoder(num_hidden_layers=4), architecture_of("llama")
    layers = model.model.layers
    before_HC = layers[1].mlp.down_proj.weight.detach().clone()
    weights = [before_HC + scale * torch.randn_like(before_HC) for scale in (0.2, 0.0, 0.05)]
    streams = Streams(layers, capture(model, architecture, partial(forward_loop, blocks)))
    proof = Proof(model, architecture, streams)
    for index in range(3):
        streams.original = streams.through(index, streams.original)
    streams.pruned = streams.through(0, streams.pruned)
    inputs = streams.advance(1, layers[1].mlp.down_proj)
    held = torch.from_numpy(blocks[-2:])
    assert proof.held == [0, 0, 0, 2]

    def log_probabilities(chosen):
        with torch.no_grad():
            layers[1].mlp.down_proj.weight.copy_(chosen)
            found = model(input_ids=held, use_cache=False).logits.log_softmax(-1)
            layers[1].mlp.down_proj.weight.copy_(before_HC)
        return found

    goal = log_probabilities(before_HC)
    skipped = layers.pop(2)
    nats = [
        float(F.kl_div(log_probabilities(each), goal, reduction="sum", log_target=True))
        for each in weights
    ]
    layers.insert(2, skipped)
    assert proof.nearest(3, inputs, before_HC, weights) == int(np.argmin(nats)) == 1
    assert proof.nearest(3, inputs, before_HC, weights[::2]) == int(np.argmin(nats[::2]))
    broken = [torch.full_like(before_HC, torch.nan), before_HC]
    assert proof.nearest(3, inputs, before_HC, broken) == 1
    assert proof.nearest(3, inputs, before_HC, [before_HC, before_HC]) == 0


def echoing(model):
    """The third layer sees what the second sees, so the second could add what the third adds.

    But one token fires channel 0 of the second so hard that the stream behind it is massive, and
    there the third adds nothing of the kind. Others fire it a little.
    """
    hidden = model.config.hidden_size
    first, second = model.model.layers[1], model.model.layers[2]
    mark_H = F.normalize(torch.randn(hidden), dim=0)
    embedding = model.model.embed_tokens.weight
    embedding.sub_(0.8 * (embedding @ mark_H)[:, None] * mark_H)
    embedding[LOUD] = 5.0 * mark_H
    for layer in (first, second):
        layer.self_attn.o_proj.weight.zero_()
    first.mlp.down_proj.weight.mul_(0.01)
    first.mlp.up_proj.weight[0], first.mlp.gate_proj.weight[0] = 4.0 * mark_H, 4.0 * mark_H
    for name in ("mlp.gate_proj", "mlp.up_proj", "post_attention_layernorm"):
        second.get_submodule(name).weight.copy_(first.get_submodule(name).weight)
    first.mlp.down_proj.weight[:, 0] = 0.1 * torch.randn(hidden)
    second.mlp.down_proj.weight[:, 0] = torch.randn(hidden)


def outcome(make_decoder, logits, seen, reconstruct):
    """Mean squared error of the logits on other text with the loud token, what was measured."""
    unseen = np.random.default_rng(9).integers(8, 512, (16, 32))
    unseen[:, 0] = LOUD
    model = make_decoder(num_hidden_layers=4)
    with torch.no_grad():
        echoing(model)
    before = logits(model, unseen)
    axes = [{"kind": "depth", "drop": [2]}]
    config = PruneConfig.model_validate({"axes": axes, "reconstruct": reconstruct})
    measured = prune_model(config, model, seen)
    return float((logits(model, unseen) - before).square().mean()), measured.get("refits")


def text(loud, sequences=48):
    """Token ids ``[sequences, 32]``; ``loud`` are the numbers of those that begin loudly."""
    found = np.random.default_rng(0).integers(8, 512, (sequences, 32))
    found[list(loud), :16] = LOUD
    return found


def test_a_fold_that_spoils_massive_tokens_leaves_the_plain_cut(make_decoder, logits):
    """They stand in the sequences held out alone: the fit cannot hold on to them."""
    seen = text(range(44, 48))
    plain, _ = outcome(make_decoder, logits, seen, None)
    kept, (refit,) = outcome(make_decoder, logits, seen, {"schedule": "sequential"})
    assert kept == plain
    assert refit["ridge"] is None
    assert refit["residual"] == refit["plain_residual"]


def test_a_fold_that_knows_massive_tokens_helps_and_stays(make_decoder, logits):
    seen = text(range(48))
    plain, _ = outcome(make_decoder, logits, seen, None)
    folded, (refit,) = outcome(make_decoder, logits, seen, {"schedule": "sequential"})
    assert folded < 0.8 * plain
    assert refit["residual"] < refit["plain_residual"]


def test_two_sequences_cannot_prove_a_fold(make_decoder, logits):
    plain, _ = outcome(make_decoder, logits, text([], 2), None)
    kept, (refit,) = outcome(make_decoder, logits, text([], 2), {"schedule": "sequential"})
    assert kept == plain
    assert refit["ridge"] is None
