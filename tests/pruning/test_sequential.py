"""Layer after layer: the same path as the model's own, and nearer to it than a refit at once."""

from functools import partial

import numpy as np
import pytest
import torch

from trt_kd.architectures import ARCHITECTURES, architecture_of
from trt_kd.config import validate
from trt_kd.errors import ConfigError
from trt_kd.pruning.sequential import Streams, capture, fold_points, spans
from trt_kd.stages.cutting import prune_model
from trt_kd.stages.prune import PruneConfig

FFN = {"kind": "ffn", "size": 128}


def forward_loop(blocks, model):
    for part in np.array_split(blocks, 3):
        with torch.no_grad():
            model.base_model(input_ids=torch.from_numpy(part), use_cache=False)


def test_capture_runs_the_layers_for_one_batch_alone(make_decoder, blocks):
    model = make_decoder()
    ran = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: ran.append(1))
    batches = capture(model, architecture_of("llama"), partial(forward_loop, blocks))
    assert (len(ran), len(batches)) == (1, 3)
    assert all(len(batch.calls) == len(model.model.layers) for batch in batches)


@pytest.mark.parametrize("model_type", ARCHITECTURES.names())
def test_the_streams_take_the_models_own_path(model_type, families, blocks):
    model = families.tiny(model_type).eval()
    architecture = architecture_of(model_type)
    seen = []
    hook = architecture.final_norm(model).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    forward_loop(blocks, model)
    hook.remove()
    layers = architecture.layers(model)
    forwards = [layer.forward for layer in layers]
    batches = capture(model, architecture, partial(forward_loop, blocks))
    assert [layer.forward for layer in layers] == forwards
    streams = Streams(layers, batches)
    for index in range(len(layers)):
        streams.original = streams.through(index, streams.original)
    for ours, theirs in zip(streams.original, seen, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_points_of_a_fold_are_the_layers_before_the_gaps(make_decoder):
    model = make_decoder(num_hidden_layers=6)
    architecture, layers = architecture_of("llama"), model.model.layers
    assert fold_points(layers, architecture, spans([0, 1, 4, 5], 6)) == [layers[1].mlp.down_proj]
    assert fold_points(layers, architecture, spans([0, 1, 2, 3], 6)) == [layers[3].mlp.down_proj]
    assert fold_points(layers, architecture, spans(range(6), 6)) == []


def one_gate(layers):
    """With one gate for all, 256 channels lie in the 128 hidden dimensions."""
    for layer in layers:
        gate = layer.mlp.gate_proj.weight
        gate.copy_(gate[:1].expand_as(gate))


def echo(layers):
    """The third layer sees nearly what the second sees, so it could add what the third adds."""
    first, second = layers[1], layers[2]
    for layer in (first, second):
        layer.self_attn.o_proj.weight.zero_()
    first.mlp.down_proj.weight.mul_(0.01)
    for name in ("mlp.gate_proj", "mlp.up_proj", "post_attention_layernorm"):
        second.get_submodule(name).weight.copy_(first.get_submodule(name).weight)


def error(make_decoder, logits, axes, reconstruct, prepare=one_gate):
    """Mean squared error of the logits on text outside the calibration, and the measurements."""
    rng = np.random.default_rng(0)
    seen, unseen = rng.integers(0, 512, (64, 32)), rng.integers(0, 512, (16, 32))
    model = make_decoder(num_hidden_layers=4)
    with torch.no_grad():
        prepare(model.model.layers)
    before = logits(model, unseen)
    config = PruneConfig.model_validate({"axes": axes, "reconstruct": reconstruct})
    measured = prune_model(config, model, seen)
    return float((logits(model, unseen) - before).square().mean()), measured


def test_a_sequential_refit_beats_the_plain_cut(make_decoder, logits):
    plain, _ = error(make_decoder, logits, [FFN], None)
    refitted, measured = error(make_decoder, logits, [FFN], {"schedule": "sequential"})
    assert refitted < 0.5 * plain
    assert [each["layer"] for each in measured["refits"]] == list(range(4))


def test_a_dropped_layer_is_made_up_for_by_the_one_before(make_decoder, logits):
    axes = [{"kind": "depth", "drop": [2]}]
    plain, _ = error(make_decoder, logits, axes, None, echo)
    folded, measured = error(make_decoder, logits, axes, {"schedule": "sequential"}, echo)
    assert folded < 0.2 * plain
    (refit,) = measured["refits"]
    assert (refit["layer"], refit["projection"]) == (1, "down_proj")
    assert refit["residual"] < refit["plain_residual"]


def test_heads_channels_and_layers_go_together(make_decoder, logits):
    axes = [FFN, {"kind": "heads", "size": 1}, {"kind": "depth", "drop": [1]}]
    plain, _ = error(make_decoder, logits, axes, None)
    refitted, measured = error(make_decoder, logits, axes, {"schedule": "sequential"})
    assert refitted < plain
    named = [(each["layer"], each["projection"]) for each in measured["refits"]]
    assert named == [(layer, name) for layer in (0, 2, 3) for name in ("o_proj", "down_proj")]


def test_an_axis_that_it_does_not_go_with_is_refused():
    settings = {"axes": [{"kind": "hidden", "size": 64}], "reconstruct": {"schedule": "sequential"}}
    with pytest.raises(ConfigError, match="sequential does not go with hidden"):
        validate(PruneConfig, settings, where="recipe")
