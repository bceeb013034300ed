import pytest
import torch

from trt_kd.checkpoints import load_model
from trt_kd.config import build_plugin
from trt_kd.errors import ModelError
from trt_kd.quantization import FORMATS
from trt_kd.quantization.calibration import calibrate, check_scales, quantizers


def test_calibration_quantizes_projections_and_leaves_the_head(teacher, calibrated, blocks):
    model = load_model(teacher.path)
    chosen = calibrate(model, calibrated, blocks).get("chosen", {})
    left = [module for module, name in chosen.items() if name == "none"]
    enabled = {name for name, quantizer in quantizers(model) if quantizer.is_enabled}
    weights = {name for name in enabled if name.endswith(("weight_quantizer", "quantizer.0"))}
    assert len(weights) == 4 * 7 - len(left)
    assert not any(name.startswith(f"{module}.") for name in enabled for module in left)
    assert not any("lm_head" in name or "embed" in name for name in enabled)


def test_calibration_changes_predictions_a_little(teacher, calibrated, blocks):
    from trt_kd.exporters.comparison import compare, logits_of

    model = load_model(teacher.path)
    reference = list(logits_of(model, blocks))
    calibrate(model, calibrated, blocks)
    difference = compare(reference, logits_of(model, blocks))
    assert 0 < difference.kl_nats < 1.0


def test_calibration_prints_nothing(teacher, calibrated, blocks, capfd):
    model = load_model(teacher.path)
    capfd.readouterr()
    calibrate(model, calibrated, blocks)
    assert capfd.readouterr().out == ""


def test_weights_that_are_no_numbers_are_an_error(make_model, blocks):
    model = make_model()
    model.model.layers[2].mlp.down_proj.weight.data[3, 3] = float("nan")
    with pytest.raises((ModelError, AssertionError, ValueError)):
        calibrate(model, build_plugin(FORMATS, "int8"), blocks)


def quantized(make_model, blocks):
    model = make_model()
    calibrate(model, build_plugin(FORMATS, "fp8"), blocks)
    return model, model.get_submodule("model.layers.1.mlp.up_proj.input_quantizer")


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
def test_a_scale_that_is_zero_or_not_finite_is_named(make_model, blocks, scale):
    model, quantizer = quantized(make_model, blocks)
    quantizer._amax.fill_(scale)
    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj.input_quantizer"):
        check_scales(model)


def test_a_layer_that_saw_no_token_is_named(make_model, blocks):
    model, quantizer = quantized(make_model, blocks)
    del quantizer._amax
    with pytest.raises(ModelError, match="no scale after calibration"):
        check_scales(model)


def test_a_model_without_quantizers_is_not_quantized(make_model):
    with pytest.raises(ModelError, match="no layer was quantized"):
        check_scales(make_model())


def test_an_output_channel_of_zeros_is_fine(make_model, blocks):
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[5] = 0.0
    calibrate(model, build_plugin(FORMATS, "int8"), blocks)
