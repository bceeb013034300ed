"""FP8 in blocks and INT4, alone or for FP8 products, on a model wide enough, by both stages."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from trt_kd.config import validate
from trt_kd.exporters import EXPORTERS
from trt_kd.exporters.arithmetic import fp8_block_weight
from trt_kd.exporters.comparison import compare, logits_of
from trt_kd.exporters.hf_unified_reader import read_model
from trt_kd.exporters.verification import load_source
from trt_kd.stages.export import ExportConfig, export
from trt_kd.stages.quantize import QuantizeConfig, quantize

LANE = EXPORTERS.load("hf-unified")()
FORMATS = {"fp8_block": "fp8_pb_wo", "w4a8_awq": "W4A8_AWQ", "int4_awq": "W4A16_AWQ"}
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32}
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module", params=FORMATS)
def made(request, make_student, text_file, tmp_path_factory):
    """Name of the format, its quantized artifact and the verified export."""
    source, root = make_student(num_key_value_heads=4, **WIDE), tmp_path_factory.mktemp("wide")
    data = {"source": {"kind": "text", "files": [str(text_file)]}, "block_tokens": 32}
    given = {"format": request.param, "data": data, "calibration_tokens": 64, "heldout_blocks": 1}
    config = validate(QuantizeConfig, given, where="quantize")
    quantized = quantize(config, source=source, out=root / "q")
    config = validate(ExportConfig, {"lane": "hf-unified", "data": data}, where="export")
    return request.param, quantized, export(config, source=quantized, out=root / "e")


def test_the_export_computes_what_was_simulated(made):
    name, source, out = made
    blocks = np.random.default_rng(2).integers(1, 512, (2, 32))
    simulated, written = load_source(source), read_model(out.path)
    found = compare(list(logits_of(simulated, blocks)), logits_of(written, blocks))
    assert found.kl_nats < LANE.kl_limit_nats(source)
    assert out.metrics["realised_low_bit_share"] > 0.7
    told = json.loads((out.path / "hf_quant_config.json").read_text())["quantization"]
    assert told["quant_algo"] == FORMATS[name]


def test_a_block_s_scale_is_its_largest_weight_over_the_largest_code(made):
    name, source, out = made
    if name != "fp8_block":
        return
    before = load_file(source.path / "model.safetensors")[f"{DOWN}.weight"].float()
    after = load_file(out.path / "model.safetensors")
    scale = after[f"{DOWN}.weight_scale"]
    largest = before.reshape(1, 128, 2, 128).abs().amax((1, 3)) / 448
    torch.testing.assert_close(scale.reshape(1, 2), largest)
    restored = fp8_block_weight(after[f"{DOWN}.weight"], scale)
    assert ((restored - before).abs() <= before.abs() * 2.0**-4 + largest.max() * 2.0**-9).all()


def scaled(name, factor):
    def change(tensors):
        tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)

    return change


def wrong_code(tensors):
    name = "model.layers.0.mlp.gate_proj.weight"
    tensors[name] = tensors[name].flip(0)


NORM = "model.layers.0.input_layernorm.weight"
AWQ, ALL = ("int4_awq", "w4a8_awq"), tuple(FORMATS)
FAULTS = {
    "weight scale": (ALL, scaled(f"{DOWN}.weight_scale", 1.4)),
    "no weight scale": (ALL, lambda t: t.pop(f"{DOWN}.weight_scale")),
    "a scale below zero": (ALL, scaled(f"{DOWN}.weight_scale", -1.0)),
    "outputs in another order": (ALL, wrong_code),
    "a norm": (ALL, scaled(NORM, 1.4)),
    "smoothing": (AWQ, scaled(f"{DOWN}.pre_quant_scale", 1.4)),
    "no smoothing": (AWQ, lambda t: t.pop(f"{DOWN}.pre_quant_scale")),
    "no second scale": (("w4a8_awq",), lambda t: t.pop(f"{DOWN}.weight_scale_2")),
    "second scale too small": (("w4a8_awq",), scaled(f"{DOWN}.weight_scale_2", 0.01)),
    "input scale": (("w4a8_awq",), scaled(f"{DOWN}.input_scale", 2.5)),
    "an embedding": (ALL, scaled("model.embed_tokens.weight", 1.01)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen_in_the_files_alone(made, fault, tmp_path):
    name, source, good = made
    kinds, change = FAULTS[fault]
    if name not in kinds:
        return
    out = tmp_path / "spoilt"
    shutil.copytree(good.path, out)
    assert LANE.problems(source, out) == []
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors")
    assert LANE.problems(source, out) != []
