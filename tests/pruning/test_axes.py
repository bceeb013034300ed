"""Laws every registered axis obeys. A new axis is tested here once it says what is dead."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from trt_kd.architectures import ARCHITECTURES, architecture_of
from trt_kd.architectures.shape import read_shape, shape_from_config
from trt_kd.checkpoints import load_model, save_model
from trt_kd.pruning import AXES, IMPORTANCE
from trt_kd.stages.prune import PruneConfig, prune_model

CUTS = {
    "ffn": {"kind": "ffn", "size": 128},
    "hidden": {"kind": "hidden", "size": 64},
    "depth": {"kind": "depth", "layers": 2},
}


def kill(model, axis):
    """Make what ``axis`` will have to drop contribute nothing."""
    architecture = architecture_of(model.config.model_type)
    layers = architecture.layers(model)
    with torch.no_grad():
        if axis == "ffn":
            for layer in layers:
                for row in (architecture.mlp(layer).up.weight, architecture.mlp(layer).gate.weight):
                    row[1::2] = 0.0
        elif axis == "hidden":
            architecture.embedding(model).weight[:, 1::2] = 0.0
            for layer in layers:
                for linear in architecture.writers(layer):
                    linear.weight[1::2] = 0.0
        else:
            for layer in (layers[1], layers[2]):
                for linear in architecture.writers(layer):
                    linear.weight.zero_()


def pruned(model, blocks, axes, **settings):
    config = PruneConfig.model_validate({"axes": axes} | settings)
    return prune_model(config, model, blocks)


@pytest.fixture(params=AXES.names())
def axis(request):
    return request.param


@pytest.fixture(params=[(name, tied) for name in ARCHITECTURES.names() for tied in (True, False)])
def decoder(request, make_decoder):
    model_type, tied = request.param
    return make_decoder(model_type, tie_word_embeddings=tied, rms_norm_eps=1e-12)


def test_removing_what_is_dead_changes_nothing(axis, decoder, blocks, logits):
    model = decoder
    kill(model, axis)
    before = logits(model, blocks)
    pruned(model, blocks, [CUTS[axis]])
    torch.testing.assert_close(logits(model, blocks), before, rtol=1e-4, atol=1e-4)


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
    assert type(again) is type(model)
    assert torch.equal(logits(again, blocks), logits(model, blocks))
    tied = model.config.tie_word_embeddings
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert read_shape(tmp_path).parameters == again.num_parameters()
    assert not [name for name in vars(model) if "modelopt" in name]


def test_a_cut_model_still_generates(axis, make_decoder, blocks):
    model = make_decoder("qwen3")
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
    orders = [["ffn", "hidden", "depth"], ["depth", "hidden", "ffn"]]
    results = []
    for order in orders:
        model = make_decoder()
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
