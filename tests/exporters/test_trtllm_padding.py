"""An MLP that ranks cannot share evenly gets channels of zeros, and is the same model."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from trt_kd.architectures.shape import ModelShape
from trt_kd.config import validate
from trt_kd.exporters.trtllm_checkpoint import TrtllmCheckpoint
from trt_kd.exporters.trtllm_layout import Ranks, padded_ffn
from trt_kd.exporters.verification import source_logits, verify
from trt_kd.stages.quantize import QuantizeConfig, quantize

SIZES = {
    "hidden_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 64,
}
FORMATS = {
    "none": (200, 240),
    "fp8": (208, 240),
    "int8_smoothquant": (208, 240),
    "int4_awq": (320, 384),
}
"""Formats, each with MLP channels that three ranks cannot share, and with those that they can."""
TOKENS = np.random.default_rng(1).integers(1, 500, (2, 32))


@pytest.fixture(scope="module", params=FORMATS)
def made(request, make_student, text_file, tmp_path_factory):
    """Lane, source, checkpoint and format."""
    ffn, padded = FORMATS[request.param]
    root, lane = tmp_path_factory.mktemp("padding"), TrtllmCheckpoint(tensor_parallel=3)
    source = make_student(dtype=torch.bfloat16, intermediate_size=ffn, **SIZES)
    if request.param != "none":
        data = {"source": {"kind": "text", "files": [str(text_file)]}, "block_tokens": 32}
        form = {"kind": request.param}
        form |= {"block_size": 64} if request.param == "int4_awq" else {}
        given = {"format": form, "data": data, "calibration_tokens": 64, "heldout_blocks": 1}
        config = validate(QuantizeConfig, given, where="quantize")
        source = quantize(config, source=source, out=root / "q")
    (root / "c").mkdir()
    told = lane.export(source, root / "c")
    assert told["mlp_channels_added"] == padded - ffn
    return lane, source, root / "c", request.param


def test_the_padded_model_is_the_same_model(made):
    lane, source, out, name = made
    difference = verify(lane, source, out, TOKENS, source_logits(source, TOKENS))
    assert difference.kl_nats < (1e-9 if name == "none" else lane.kl_limit_nats(source))
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == FORMATS[name][1]


def test_what_was_added_is_zero_and_stands_at_the_end(made):
    _, _, out, name = made
    layer = "transformer.layers.1.mlp"
    ranks = [load_file(out / f"rank{rank}.safetensors") for rank in range(3)]
    branch = torch.cat([rank[f"{layer}.fc.weight"].float() for rank in ranks])
    back = torch.cat([rank[f"{layer}.proj.weight"].float() for rank in ranks], dim=1)
    ffn = FORMATS[name][0]
    rows = ffn // 2 if name == "int4_awq" else ffn
    assert not branch[rows:].any()
    assert not back[:, ffn:].any()
    assert branch[:rows].any(1).all()


@pytest.mark.parametrize("fault", ["a channel that is not zero", "a channel lost"])
def test_a_planted_fault_in_the_added_channels_is_seen(made, fault, tmp_path):
    lane, source, good, _ = made
    out = tmp_path / "spoilt"
    shutil.copytree(good, out)
    assert lane.problems(source, out) == []
    name = "transformer.layers.1.mlp.fc.weight"
    rank = "rank0" if fault == "a channel lost" else "rank2"
    tensors = load_file(out / f"{rank}.safetensors")
    codes = tensors[name].float()
    if fault == "a channel lost":
        codes[0] = 0
    else:
        codes[-1] = load_file(out / "rank0.safetensors")[name][0].float()
    tensors[name] = codes.to(tensors[name].dtype)
    save_file(tensors, out / f"{rank}.safetensors")
    assert lane.problems(source, out) != []


@pytest.mark.parametrize(
    ("ffn", "tp", "low_bit", "block", "padded"),
    [
        (896, 1, False, None, 896),
        (896, 2, False, None, 896),
        (897, 3, False, None, 897),
        (896, 3, False, None, 912),
        (896, 3, True, None, 912),
        (897, 3, True, None, 912),
        (896, 3, True, 64, 960),
        (896, 3, True, 128, 1152),
        (960, 3, True, 64, 960),
    ],
)
def test_no_more_channels_are_added_than_ranks_and_kernels_ask_for(ffn, tp, low_bit, block, padded):
    shape = ModelShape("llama", 2, 576, ffn, 9, 3, 64, 512, tied=True)
    assert padded_ffn(shape, Ranks(tp, 1), low_bit=low_bit, block=block) == padded
