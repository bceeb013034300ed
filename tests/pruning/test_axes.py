"""Laws every registered axis obeys. A new axis is tested here once it says what is dead."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from trt_kd.architectures.shape import read_shape, shape_from_config
from trt_kd.checkpoints import load_model, save_model
from trt_kd.pruning import AXES, IMPORTANCE
from trt_kd.stages.cutting import prune_model
from trt_kd.stages.prune import PruneConfig

CUTS = {
    "ffn": {"kind": "ffn", "size": 128},
    "hidden": {"kind": "hidden", "size": 64},
    "heads": {"kind": "heads", "size": 1},
    "kv_heads": {"kind": "kv_heads", "size": 1},
    "expert_ffn": {"kind": "expert_ffn", "size": 16, "multiple_of": 16},
    "experts": {"kind": "experts", "size": 4},
    "depth": {"kind": "depth", "layers": 2},
}
"""By axis of ModelOpt's mode; the vocabulary is cut by the stage, see test_prune.py."""
DENSE = ["ffn", "heads", "kv_heads", "hidden", "depth"]


def kill(model, axis):
    """Make every second unit of ``axis`` in a Llama of four heads in two groups idle."""
    with torch.no_grad():
        if axis == "hidden":
            model.model.embed_tokens.weight[:, 1::2] = 0.0
        for index, layer in enumerate(model.model.layers):
            o, down = layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight
            if axis == "ffn":
                for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                    linear.weight[1::2] = 0.0
            elif axis == "kv_heads":
                layer.self_attn.v_proj.weight[layer.self_attn.head_dim :] = 0.0
            elif axis == "hidden":
                o[1::2], down[1::2] = 0.0, 0.0
            elif index in (1, 2):
                o.zero_(), down.zero_()


def pruned(model, blocks, axes, **settings):
    config = PruneConfig.model_validate({"axes": axes} | settings)
    return prune_model(config, model, blocks)


@pytest.fixture(params=[name for name in AXES.names() if name != "vocab"])
def axis(request):
    return request.param


@pytest.fixture
def decoder(axis, make_decoder):
    """A decoder that has the axis."""
    return make_decoder("mixtral" if "expert" in axis else "llama", num_hidden_layers=4)


@pytest.mark.parametrize("axis", ["ffn", "kv_heads", "hidden", "depth"])
def test_what_is_dead_is_found_and_its_removal_changes_nothing(axis, make_decoder, blocks, logits):
    model = make_decoder(num_hidden_layers=4, rms_norm_eps=1e-12)
    kill(model, axis)
    before = logits(model, blocks)
    pruned(model, blocks, [CUTS[axis]])
    torch.testing.assert_close(logits(model, blocks), before, rtol=1e-4, atol=1e-4)


def test_a_head_that_says_what_its_neighbour_says_is_made_up_for(make_decoder, blocks, logits):
    """Without queries and keys all heads of a group put out the same mean of the values."""
    model = make_decoder(num_hidden_layers=4)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.k_proj.weight.zero_()
    before = logits(model, blocks)
    ridges = {"ridges": [1e-6]}
    pruned(model, blocks, [CUTS["heads"]], reconstruct=ridges)
    torch.testing.assert_close(logits(model, blocks), before, rtol=0, atol=1e-3)


def test_the_planned_shape_is_the_shape_of_the_cut_model(axis, decoder, blocks):
    model = decoder
    config = PruneConfig.model_validate({"axes": [CUTS[axis]]})
    planned = config.planned(shape_from_config(model.config.to_dict()))
    prune_model(config, model, blocks)
    assert shape_from_config(model.config.to_dict()) == planned
    assert model.num_parameters() == planned.parameters


def test_a_cut_model_is_a_stock_checkpoint(axis, decoder, blocks, logits, tokenizer_dir, tmp_path):
    model = decoder
    pruned(model, blocks, [CUTS[axis]])
    save_model(model, tmp_path, tokenizer_from=tokenizer_dir)
    again = load_model(tmp_path)  # refuses missing, unexpected and misshapen keys
    assert torch.equal(logits(again, blocks), logits(model, blocks))
    assert read_shape(tmp_path).parameters == again.num_parameters()
    assert not [name for name in vars(model) if "modelopt" in name]


def test_a_cut_model_still_generates(axis, decoder, blocks):
    model = decoder
    pruned(model, blocks, [CUTS[axis]])
    tokens = torch.from_numpy(blocks[:1, :4])
    grown = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=3,
        min_new_tokens=3,
        pad_token_id=0,
    )
    assert grown.shape == (1, 7)


def test_all_axes_at_once_in_any_order_give_the_same_model(make_decoder, blocks, logits):
    orders = [DENSE, DENSE[::-1]]
    results = []
    for order in orders:
        model = make_decoder(num_hidden_layers=4)
        pruned(model, blocks, [CUTS[axis] for axis in order])
        results.append(logits(model, blocks))
    assert torch.equal(*results)


def test_the_registered_name_is_the_default_kind():
    for registry in (AXES, IMPORTANCE):
        assert [registry.load(name)().kind for name in registry.names()] == registry.names()


def test_kept_channels_stay_in_their_old_order(make_decoder, blocks):
    model = make_decoder()
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    pruned(model, blocks, [CUTS["ffn"]])
    after = model.model.layers[0].mlp.up_proj.weight
    places = [int((before == row).all(dim=1).nonzero()) for row in after]
    assert places == sorted(places)


def test_a_size_that_is_the_models_own_changes_nothing(make_decoder, blocks, logits):
    model = make_decoder()
    before = logits(model, blocks)
    own = [{"kind": "ffn", "size": 256}, {"kind": "hidden", "size": 128}]
    pruned(model, blocks, [*own, {"kind": "depth", "layers": 4}])
    torch.testing.assert_close(logits(model, blocks), before)


def test_activations_find_the_dead_channels_and_chance_does_not(make_decoder, blocks, logits):
    errors = {}
    for importance in ("activation", "random"):
        model = make_decoder()
        kill(model, "ffn")
        before = logits(model, blocks)
        pruned(model, blocks, [CUTS["ffn"]], importance=importance, reconstruct=None)
        errors[importance] = float((logits(model, blocks) - before).abs().max())
    assert errors["activation"] < 1e-4
    assert errors["random"] > 100 * errors["activation"]


def test_chance_depends_on_the_seed_alone(make_decoder, blocks, logits):
    def run(seed):
        model = make_decoder()
        pruned(model, blocks, [CUTS["ffn"]], importance="random", seed=seed)
        return logits(model, blocks)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_named_layers_are_dropped(make_decoder, blocks):
    model = make_decoder()
    kept = [model.model.layers[0], model.model.layers[2]]
    measured = pruned(model, blocks, [{"kind": "depth", "drop": [3, 1]}])
    assert list(model.model.layers) == kept
    assert measured["kept_layers"] == [0, 2]


def test_the_first_and_the_last_layer_stay_while_others_can_go(make_decoder, blocks):
    model = make_decoder(num_hidden_layers=5)
    with torch.no_grad():  # the ends do nothing at all
        for index in (0, 4):
            model.model.layers[index].self_attn.o_proj.weight.zero_()
            model.model.layers[index].mlp.down_proj.weight.zero_()
    measured = pruned(model, blocks, [{"kind": "depth", "layers": 2}])
    assert measured["kept_layers"] == [0, 4]


def test_a_model_of_two_layers_can_lose_one(make_decoder, blocks):
    model = make_decoder(num_hidden_layers=2)
    assert len(pruned(model, blocks, [{"kind": "depth", "layers": 1}])["kept_layers"]) == 1


def test_a_contiguous_cut_takes_the_run_whose_ends_differ_least(make_decoder, blocks):
    model = make_decoder(num_hidden_layers=6)
    with torch.no_grad():  # layers 2 and 3 undo each other, though neither is idle alone
        second, third = model.model.layers[2], model.model.layers[3]
        for layer in (second, third):
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        second.mlp.gate_proj.weight.copy_(third.mlp.gate_proj.weight)
    axis = {"kind": "depth", "layers": 4, "contiguous": True}
    assert pruned(model, blocks, [axis])["kept_layers"] == [0, 1, 4, 5]


def test_block_influence_equals_its_definition(make_decoder, blocks):
    model = make_decoder()
    with torch.no_grad():
        states = model(input_ids=torch.from_numpy(blocks), output_hidden_states=True).hidden_states[
            :-1
        ]
    x = [state.double().flatten(0, 1).numpy() for state in states]
    cosine = [
        (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        for a, b in pairwise(x)
    ]
    measured = pruned(model, blocks, [CUTS["depth"]])
    expected = [1.0 - value.mean() for value in cosine]
    assert measured["block_influence"][:3] == pytest.approx(expected, rel=1e-4)


def test_activation_importance_equals_its_definition():
    x_BLC = np.random.default_rng(0).normal(size=(5, 7, 3))
    importance = IMPORTANCE.load("activation")()
    total = sum(importance.contribution(torch.from_numpy(part)) for part in (x_BLC[:2], x_BLC[2:]))
    expected = np.sqrt((np.abs(x_BLC).mean(axis=1) ** 2).sum(axis=0))
    scores = importance.scores(total, torch.Generator()).numpy()
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one NVIDIA GPU")
def test_a_gpu_cuts_the_same_model(axis, make_decoder, blocks, logits):
    here, there = make_decoder(), make_decoder().cuda()
    for model in (here, there):
        pruned(model, blocks, [CUTS[axis]])
    torch.testing.assert_close(logits(there.cpu(), blocks), logits(here, blocks), rtol=0, atol=0.01)
