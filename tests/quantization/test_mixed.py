"""A format for every layer: the budget holds, the choice is told and follows the scores."""

import pytest

from trt_kd.architectures.shape import ModelShape
from trt_kd.checkpoints import load_model
from trt_kd.config import build_plugin, validate
from trt_kd.errors import ConfigError
from trt_kd.quantization import FORMATS
from trt_kd.quantization.calibration import calibrate, quantizers
from trt_kd.stages.quantize import QuantizeConfig, quantize

AWQ = {"kind": "int4_awq", "block_size": 64}
GIVEN = {"kind": "mixed", "formats": ["fp8", AWQ], "score_tokens": 64}


@pytest.fixture(scope="module")
def made(teacher, text_file, tmp_path_factory):
    """The teacher quantized by the stage at six bits."""
    source = {"kind": "text", "files": [str(text_file)]}
    settings = {
        "format": GIVEN | {"effective_bits": 6.0},
        "data": {"source": source, "block_tokens": 32},
        "calibration_tokens": 128,
        "heldout_blocks": 2,
    }
    config = validate(QuantizeConfig, settings, where="quantize")
    return quantize(config, source=teacher, out=tmp_path_factory.mktemp("mixed") / "q")


def test_the_manifest_tells_every_projection_s_format_and_the_bits(made, make_model):
    chosen = made.metrics["layer_formats"]
    assert len(chosen) == 4 * 7
    assert set(chosen.values()) <= {"fp8", "int4_awq block_size=64", "none"}
    bits = {"fp8": 8, "int4_awq block_size=64": 4, "none": 16}
    sizes = {name: make_model().get_parameter(f"{name}.weight").numel() for name in chosen}
    spent = sum(sizes[name] * bits[chosen[name]] for name in chosen) / sum(sizes.values())
    assert made.metrics["effective_bits"] == pytest.approx(spent)
    assert 5.0 < spent <= 6.0


def test_what_a_runtime_fuses_has_one_format(made):
    chosen = made.metrics["layer_formats"]
    for layer in range(4):
        place = f"model.layers.{layer}"
        assert len({chosen[f"{place}.self_attn.{n}_proj"] for n in "qkv"}) == 1
        assert len({chosen[f"{place}.mlp.{n}_proj"] for n in ("gate", "up")}) == 1


def test_the_quantizers_are_those_of_the_choice(teacher, blocks):
    model = load_model(teacher.path)
    chosen = calibrate(model, build_plugin(FORMATS, GIVEN), blocks)["chosen"]
    bits = {"fp8": (4, 3), "int4_awq block_size=64": 4}
    enabled = {name: quantizer for name, quantizer in quantizers(model) if quantizer.is_enabled}
    for module, name in chosen.items():
        quantizer = enabled.get(f"{module}.weight_quantizer")
        assert (quantizer and quantizer.num_bits) == bits.get(name)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"effective_bits": 3.5}, "below the 4 bits"),
        ({"effective_bits": 16}, "less than 16"),
        ({"formats": ["fp8", "fp8"]}, "stands twice"),
        ({"formats": ["fp8", "mixed"]}, "no format of one layer"),
        ({"formats": []}, "at least 1"),
    ],
)
def test_a_search_that_cannot_be_is_refused(changes, what):
    with pytest.raises(ConfigError, match=what):
        validate(QuantizeConfig, {"format": GIVEN | changes}, where="quantize")


def test_every_member_is_checked_and_experts_are_refused():
    shape = ModelShape("llama", 4, 96, 128, 4, 2, 24, 512, tied=True)
    mixed = build_plugin(FORMATS, {"kind": "mixed", "formats": ["fp8", AWQ]})
    assert any("block size of int4_awq" in problem for problem in mixed.check(shape))
    import dataclasses

    experts = dataclasses.replace(shape, hidden=128, experts=4)
    assert "does not choose among experts" in mixed.check(experts)[0]
