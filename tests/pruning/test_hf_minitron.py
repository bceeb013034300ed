"""The ModelOpt mode, called the way ModelOpt's users call it."""

import warnings
from functools import partial

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import modelopt.torch.prune as mtp

    import trt_kd.pruning.hf_minitron as mode

from trt_kd.errors import ConfigError, ModelError


def forward_loop(blocks, model):
    for block in blocks:
        model(input_ids=torch.from_numpy(block[None]), use_cache=False)


def prune(model, blocks, constraints, config=None, **settings):
    return mtp.prune(
        model,
        mode=[("hf_minitron", settings)],
        constraints=constraints,
        dummy_input=None,
        config={"forward_loop": partial(forward_loop, blocks), **(config or {})},
    )


def test_export_config_alone_cuts_with_default_axes(make_decoder, blocks):
    sizes = {"ffn_hidden_size": 128, "hidden_size": 64, "num_layers": 3}
    model, result = prune(make_decoder(), blocks, {"export_config": sizes})
    config = model.config
    assert (config.intermediate_size, config.hidden_size, config.num_hidden_layers) == (128, 64, 3)
    assert result["best"]["kept_sizes"] == sizes


def test_heads_are_counted_as_in_the_config(make_decoder, blocks):
    """Eight heads in four groups: two groups of one head each stay."""
    sizes = {"num_attention_heads": 2, "num_query_groups": 2}
    decoder = make_decoder(num_attention_heads=8, num_key_value_heads=4, head_dim=16)
    model, result = prune(decoder, blocks, {"export_config": sizes})
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 2)
    assert result["best"]["kept_sizes"] == sizes


@pytest.mark.parametrize("limit", ["80%", 0.8])
def test_params_is_a_share_or_a_number(make_decoder, blocks, limit):
    model = make_decoder()
    before = model.num_parameters()
    params = limit if isinstance(limit, str) else int(limit * before)
    model, _ = prune(model, blocks, {"params": params}, axes=[{"kind": "ffn"}])
    assert 0.7 * before < model.num_parameters() <= 0.8 * before


def test_limits_on_open_axes_search_for_the_best_sizes(make_decoder, blocks):
    model = make_decoder()
    before = model.num_parameters()
    limits = {"max_width_pruning": 0.7, "max_depth_pruning": 0.6, "top_k": 3}
    axes = [{"kind": "ffn", "multiple_of": 16}, {"kind": "depth"}]
    model, result = prune(model, blocks, {"params": "80%"}, limits, axes=axes)
    found = result["best"]["search"]
    best = min(found["measured"], key=lambda row: row["divergence_nats"])
    assert found["winner"] == best["name"]
    assert model.num_parameters() == best["parameters"] <= 0.8 * before


def test_the_users_own_score_decides(make_decoder, blocks):
    """Prefers the most layers, whatever that does to the text."""
    limits = {"max_width_pruning": 0.9, "max_depth_pruning": 0.9, "top_k": 5}
    model, result = prune(
        make_decoder(),
        blocks,
        {"params": 0.8},
        limits | {"score_func": lambda pruned: pruned.config.num_hidden_layers},
        axes=[{"kind": "ffn", "multiple_of": 16}, {"kind": "depth"}],
    )
    rows = result["best"]["search"]["measured"]
    assert len({row["score"] for row in rows}) > 1
    assert model.config.num_hidden_layers == max(row["score"] for row in rows)


def test_without_axes_all_of_the_family_are_searched_but_those_skipped(make_decoder, blocks):
    limits = {"max_width_pruning": 0.9, "max_depth_pruning": 0.9, "top_k": 1}
    skipped = {"hparams_to_skip": ["hidden_size", "num_attention_heads", "num_query_groups"]}
    before = make_decoder().config
    model, _ = prune(make_decoder(), blocks, {"params": "75%"}, limits | skipped)
    assert model.config.hidden_size == before.hidden_size
    assert model.config.num_attention_heads == before.num_attention_heads
    assert model.num_parameters() < make_decoder().num_parameters()


def test_a_search_needs_text_to_measure_with(make_decoder, blocks):
    with pytest.raises(ModelError, match="needs 4 sequences"):
        prune(make_decoder(), blocks[:2], {"params": "80%"}, axes=["ffn", "depth"])


@pytest.mark.parametrize(
    ("constraints", "what"),
    [
        ({"flops": "50%"}, "unsupported constraints"),
        ({"export_config": {"mamba_num_heads": 2}}, "disagree on mamba_num_heads"),
        ({"export_config": {"ffn_hidden_size": 100}}, "off the grid"),
    ],
)
def test_constraints_it_cannot_keep_are_refused(make_decoder, blocks, constraints, what):
    with pytest.raises((ConfigError, ModelError), match=what):
        prune(make_decoder(), blocks, constraints)


def test_it_needs_a_forward_loop(make_decoder):
    with pytest.raises(ConfigError, match="needs calibration text"):
        mtp.prune(
            make_decoder(),
            mode=[("hf_minitron", {})],
            constraints={"export_config": {"ffn_hidden_size": 128}},
            dummy_input=None,
        )


def test_a_forward_loop_that_runs_nothing_is_an_error(make_decoder, blocks):
    with pytest.raises(ModelError, match="ran no batch"):
        prune(make_decoder(), blocks[:0], {"export_config": {"ffn_hidden_size": 128}})


@pytest.mark.parametrize("axis", ["ffn_hidden_size", "hidden_size", "num_layers"])
def test_activations_that_are_not_finite_are_an_error(make_decoder, blocks, axis):
    model = make_decoder()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[5] = float("nan")
    size = 2 if axis == "num_layers" else 64
    with pytest.raises(ModelError, match="not finite"):
        prune(model, blocks, {"export_config": {axis: size}})


def test_no_hook_and_no_record_stays_on_the_model(make_decoder, blocks):
    model, _ = prune(make_decoder(), blocks, {"export_config": {"num_layers": 3}})
    mode.detach_state(model)
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []
    assert not [name for name in vars(model) if "modelopt" in name]


def test_an_unsupported_model_is_named(blocks):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=512))
    with pytest.raises(ModelError, match="'gpt2' is not supported"):
        prune(model, blocks, {"export_config": {"num_layers": 1}})
