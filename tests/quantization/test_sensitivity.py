"""The cost of a layer is the KL of the model in which that layer alone is quantized."""

import numpy as np
import pytest
import torch

from trt_kd.checkpoints import load_model
from trt_kd.errors import ModelError
from trt_kd.exporters.comparison import compare, logits_of
from trt_kd.quantization.calibration import calibrate, quantizers
from trt_kd.quantization.sensitivity import Original


@pytest.fixture
def pair(teacher, calibrated, blocks):
    """The teacher in float32, and its twin in a format."""
    twin = load_model(teacher.path, dtype="float32")
    calibrate(twin, calibrated, blocks)
    return load_model(teacher.path, dtype="float32"), twin


def test_the_cost_of_a_layer_is_that_of_a_model_with_only_this_layer_quantized(
    pair, calibrated, teacher, blocks
):
    """The reference folds nothing back: it rebuilds the mixed model and compares in float64."""
    model, twin = pair
    original = Original(model, model.model.layers, blocks)
    reference = list(logits_of(model, blocks))
    for layer in (0, 3):
        found = original.with_layer(twin.model.layers, layer)
        mixed = load_model(teacher.path, dtype="float32")
        mixed.model.layers[layer] = twin.model.layers[layer]
        expected = compare(reference, logits_of(mixed, blocks)).kl_nats
        assert np.mean(found) == pytest.approx(expected, rel=1e-2, abs=2e-6)
        assert len(found) == len(blocks)


def test_switching_the_quantizers_of_the_other_layers_off_is_the_same(make_model, blocks):
    """FP8 leaves the weights alone, so Model Optimizer's own switches are the reference."""
    from trt_kd.config import build_plugin
    from trt_kd.quantization import FORMATS

    model, twin = make_model(), make_model()
    calibrate(twin, build_plugin(FORMATS, "fp8"), blocks)
    original = Original(model, model.model.layers, blocks)
    found = original.with_layer(twin.model.layers, 2)
    for name, quantizer in quantizers(twin):
        if ".layers.2." not in name:
            quantizer.disable()
    assert found == original.divergence(twin)


def test_the_original_is_itself_before_and_after(pair, blocks):
    model, twin = pair
    before = [parameter.clone() for parameter in model.parameters()]
    own = list(model.model.layers)
    original = Original(model, model.model.layers, blocks)
    assert np.abs(original.divergence(model)).max() < 1e-6
    original.with_layer(twin.model.layers, 1)
    assert all(a is b for a, b in zip(own, model.model.layers, strict=True))
    assert all(map(torch.equal, before, model.parameters()))


def test_a_layer_of_zero_error_costs_nothing_and_all_layers_are_the_whole(pair, blocks):
    model, twin = pair
    original = Original(model, model.model.layers, blocks)
    assert np.abs(original.with_layer(model.model.layers, 0)).max() < 1e-6
    for layer, quantized in enumerate(twin.model.layers):
        model.model.layers[layer] = quantized
    assert original.divergence(model) == pytest.approx(original.divergence(twin), abs=2e-6)


def test_a_layer_that_overflows_is_an_error_and_leaves_the_original(make_model, blocks):
    model, twin = make_model(), make_model()
    original = Original(model, model.model.layers, blocks)
    twin.model.layers[1].mlp.down_proj.weight.data.fill_(float("nan"))
    own = model.model.layers[1]
    with pytest.raises(ModelError, match="not finite"):
        original.with_layer(twin.model.layers, 1)
    assert model.model.layers[1] is own
