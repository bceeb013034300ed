"""INT4 in checkpoints of TensorRT-LLM: packed, split over ranks, read back, spoilt."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.exporters.planting import setting, tensors, without
from trt_kd.architectures.shape import ModelShape, read_shape
from trt_kd.artifacts import Artifact, writing
from trt_kd.checkpoints import load_model, save_model
from trt_kd.config import StageConfig, build_plugin
from trt_kd.errors import ModelError, VerificationError
from trt_kd.exporters import EXPORTERS
from trt_kd.exporters.comparison import compare, logits_of
from trt_kd.exporters.trtllm_checkpoint import TrtllmCheckpoint
from trt_kd.exporters.trtllm_reader import read_model
from trt_kd.exporters.verification import source_logits, verify
from trt_kd.quantization import FORMATS
from trt_kd.quantization.calibration import calibrate
from trt_kd.quantization.storage import QUANTIZERS, save_quantized


def sizes(block):
    """Sizes whose blocks split over three ranks."""
    return {
        "hidden_size": 3 * block,
        "intermediate_size": 3 * block,
        "num_hidden_layers": 2,
        "num_attention_heads": 3 * block // 64,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "initializer_range": 0.07,
    }


SMOLLM = ModelShape("llama", 30, 576, 1536, 9, 3, 64, 49152, tied=True)
LAYER = "transformer.layers.1"


class Made(StageConfig):
    stage = "quantize"
    format: dict


def awq(**options):
    return build_plugin(FORMATS, {"kind": "int4_awq", **options})


def lane(tp=1, pp=1, dtype="bfloat16"):
    return TrtllmCheckpoint(tensor_parallel=tp, pipeline_parallel=pp, dtype=dtype)


@pytest.fixture(scope="module")
def int4(make_model, tokenizer_dir, blocks, tmp_path_factory):
    """Quantized artifacts by block size, each made when first asked for."""
    made = {}

    def make(block: int) -> Artifact:
        if block in made:
            return made[block]
        folder = tmp_path_factory.mktemp("int4")
        with writing(folder / "m", kind="checkpoint", config=Made(format={}), inputs={}) as draft:
            save_model(make_model(**sizes(block)), draft.path, tokenizer_from=tokenizer_dir)
        source, plugin = Artifact.open(folder / "m"), awq(block_size=block, kv_cache="fp8")
        model = load_model(source.path)
        before = list(logits_of(model, blocks))
        kept = calibrate(model, plugin, blocks)
        config = Made(format=plugin.model_dump())
        with writing(folder / "q", kind="quantized", config=config, inputs={}) as draft:
            save_quantized(model, source, draft.path, kept)
            draft.metrics["kl_to_source_nats"] = compare(before, logits_of(model, blocks)).kl_nats
        made[block] = Artifact.open(folder / "q")
        return made[block]

    return make


@pytest.mark.parametrize(
    ("block", "tp", "pp"), [(64, 1, 1), (64, 3, 1), (64, 3, 2), (128, 1, 1), (128, 3, 2)]
)
def test_int4_reads_back_within_the_limit(int4, blocks, tmp_path, block, tp, pp):
    source = int4(block)
    made = lane(tp, pp)
    assert made.check(read_shape(source.path), "quantized") == []
    assert made.check_source(source) == []
    metrics = made.export(source, tmp_path)
    assert metrics["quant_algo"] == "W4A16_AWQ"
    assert metrics["group_size"] == block
    assert metrics["realised_low_bit_share"] > 0.7
    difference = verify(made, source, tmp_path, blocks, source_logits(source, blocks))
    assert 0 < difference.kl_nats < made.kl_limit_nats(source)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_int4_is_the_same_model_whatever_the_ranks(int4, blocks, tmp_path, dtype):
    logits = []
    for tp, pp in ((1, 1), (3, 1), (3, 2)):
        out = tmp_path / f"{tp}-{pp}"
        out.mkdir()
        lane(tp, pp, dtype).export(int4(64), out)
        logits.append(list(logits_of(read_model(out), blocks)))
    for other in logits[1:]:
        np.testing.assert_array_equal(logits[0], other)


def test_config_json_says_what_the_kernels_are_told(int4, tmp_path):
    lane(3).export(int4(64), tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())["quantization"]
    assert told == {
        "quant_algo": "W4A16_AWQ",
        "kv_cache_quant_algo": "FP8",
        "group_size": 64,
        "has_zero_point": False,
        "pre_quant_scale": True,
        "exclude_modules": ["lm_head"],
    }


def test_two_outputs_share_a_byte_and_every_code_is_the_nearest(int4, tmp_path):
    """The reference unpacks by hand, in float64, from the source's own weight."""
    source = int4(64)
    lane().export(source, tmp_path)
    written = load_file(tmp_path / "rank0.safetensors")
    prefix = f"{LAYER}.mlp.proj"
    bytes_RI = written[f"{prefix}.weight"].numpy().view(np.uint8).astype(int)
    scale_OG = written[f"{prefix}.weights_scaling_factor"].double().numpy()
    factor_I = written[f"{prefix}.prequant_scaling_factor"].double().numpy()
    name = "model.layers.1.mlp.down_proj.weight"
    true_OI = load_file(source.path / "model.safetensors")[name].double().numpy() / factor_I
    assert bytes_RI.shape == (96, 192)
    assert scale_OG.shape == (192, 3)
    for output, channel in ((0, 0), (1, 0), (2, 70), (77, 191), (126, 100), (127, 101)):
        byte = bytes_RI[output // 2, channel]
        nibble = byte // 16 if output % 2 else byte % 16
        code = nibble - 16 if nibble > 7 else nibble
        step = scale_OG[output, channel // 64]
        assert abs(code - true_OI[output, channel] / step) <= 0.51
    largest = np.abs(true_OI.reshape(192, 3, 64)).max(2)
    np.testing.assert_allclose(scale_OG, largest / 7, rtol=0.005)


def test_query_key_and_value_share_one_smoothing_and_no_input_scale(int4, tmp_path):
    source = int4(64)
    lane().export(source, tmp_path)
    seen, written = load_file(source.path / QUANTIZERS), load_file(tmp_path / "rank0.safetensors")
    own = [
        seen[f"model.layers.1.self_attn.{part}_proj.input_quantizer._pre_quant_scale"].float()
        for part in "qkv"
    ]
    factor = written[f"{LAYER}.attention.qkv.prequant_scaling_factor"]
    torch.testing.assert_close(factor, torch.stack(own).mean(0).flatten().bfloat16())
    assert not any("activation_scaling_factor" in name for name in written)


def test_sizes_that_do_not_split_into_blocks_are_refused_with_those_that_do():
    """Nine heads of 64 channels and 1536 in the MLP: blocks of 64 split over 1 and 3 ranks."""
    for tp in (1, 3):
        assert lane(tp).check_format(SMOLLM, awq(block_size=64)) == []
    (problem,) = lane(2).check_format(SMOLLM, awq(block_size=64))
    assert problem.startswith("tensor_parallel 2 with blocks of 64: 9 query heads do not split")
    assert problem.endswith("legal: 1, 3, 9")
    (problem,) = lane(3).check_format(SMOLLM, awq())
    assert "576 channels into the attention inputs projections" in problem
    assert "192 channels into the attention projections of a rank are no multiple of 128" in problem
    assert problem.endswith("legal: none")
    narrow = replace(SMOLLM, heads=8, kv_heads=4, head_dim=8, hidden=64)
    (problem,) = lane(2).check_format(narrow, awq(block_size=64))
    assert "64 query, key and value rows" not in problem
    assert "32 channels into the attention projections" in problem
    odd = replace(SMOLLM, heads=8, kv_heads=2, head_dim=8, hidden=64)
    (problem,) = lane(1).check_format(odd, awq(block_size=64))
    assert "96 query, key and value rows of a rank are no multiple of 64" in problem


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_sixteen_bits_are_asked_for_beside_int4(int4, tmp_path, dtype):
    source = int4(64)
    with pytest.raises(ModelError, match="set dtype=bfloat16"):
        lane(dtype=dtype).export(source, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["trtllm-checkpoint", "trtllm-engine"])
@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "mixed"},
        {"kind": "recipe", "name": "fp8_default-kv_fp8"},
        {"kind": "nvfp4"},
        {"kind": "int4_awq"},
    ],
    ids=lambda settings: settings["kind"],
)
def test_what_is_not_written_is_refused_before_anything_is_quantized(kind, settings):
    problems = EXPORTERS.load(kind)().check_format(SMOLLM, build_plugin(FORMATS, settings))
    assert problems
    if settings["kind"] != "int4_awq":
        assert "is not written by trtllm-checkpoint; those that are: fp8, int8," in problems[0]


# Faults planted in a checkpoint on three ranks: each must be seen.


def nibbles_swapped(loaded):
    packed = loaded[f"{PROJ}.weight"].view(torch.uint8)
    loaded[f"{PROJ}.weight"] = ((packed >> 4) | (packed << 4)).view(torch.int8)


QKV, PROJ = f"{LAYER}.attention.qkv", f"{LAYER}.mlp.proj"
CACHE = f"{LAYER}.attention.kv_cache_scaling_factor"
FAULTS = {
    "group size": setting("quantization", "group_size", value=128),
    "another group size": setting("quantization", "group_size", value=32),
    "group size missing": without("quantization", "group_size"),
    "zero point": setting("quantization", "has_zero_point", value=True),
    "no smoothing told": setting("quantization", "pre_quant_scale", value=False),
    "smoothing not told": without("quantization", "pre_quant_scale"),
    "another algorithm": setting("quantization", "quant_algo", value="W8A8_SQ_PER_CHANNEL"),
    "head in INT4": setting("quantization", "exclude_modules", value=[]),
    "nibbles swapped": tensors(nibbles_swapped),
    "one byte": tensors(lambda t: t[f"{QKV}.weight"][3, 5].bitwise_xor_(0x22)),
    "unsigned codes": tensors(lambda t: t[f"{PROJ}.weight"].bitwise_xor_(-0x78)),
    "scale of one block": tensors(lambda t: t[f"{QKV}.weights_scaling_factor"][7, 1].mul_(1.05)),
    "scale of zero": tensors(lambda t: t[f"{QKV}.weights_scaling_factor"][7, 1].zero_()),
    "blocks swapped": tensors(
        lambda t: t.update(
            {
                f"{QKV}.weights_scaling_factor": t[f"{QKV}.weights_scaling_factor"]
                .flip(1)
                .contiguous()
            }
        ),
        rank=1,
    ),
    "scale missing": tensors(lambda t: t.pop(f"{PROJ}.weights_scaling_factor")),
    "smoothing": tensors(lambda t: t[f"{PROJ}.prequant_scaling_factor"].mul_(1.25), rank=2),
    "smoothing of one channel": tensors(lambda t: t[f"{PROJ}.prequant_scaling_factor"][3].mul_(2)),
    "smoothing missing": tensors(lambda t: t.pop(f"{PROJ}.prequant_scaling_factor")),
    "ranks of the smoothing differ": tensors(
        lambda t: t[f"{QKV}.prequant_scaling_factor"].mul_(2), rank=1
    ),
    "codes of another type": tensors(
        lambda t: t.update({f"{PROJ}.weight": t[f"{PROJ}.weight"].view(torch.uint8)})
    ),
    "ranks swapped": lambda out: [
        (out / "rank0.safetensors").rename(out / "aside"),
        (out / "rank1.safetensors").rename(out / "rank0.safetensors"),
        (out / "aside").rename(out / "rank1.safetensors"),
    ],
    "scale of the cache": tensors(
        lambda t: t[f"{LAYER}.attention.kv_cache_scaling_factor"].mul_(2)
    ),
}


@pytest.fixture(scope="module")
def good(int4, blocks, tmp_path_factory):
    """A good export over three ranks, with its source and the source's logits."""
    source, out = int4(64), tmp_path_factory.mktemp("good")
    reference = source_logits(source, blocks)
    lane(3).export(source, out)
    verify(lane(3), source, out, blocks, reference)
    return source, out, reference


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(good, blocks, tmp_path, fault):
    source, out, reference = good
    spoilt = tmp_path / "spoilt"
    shutil.copytree(out, spoilt)
    FAULTS[fault](spoilt)
    with pytest.raises(VerificationError):
        verify(lane(3), source, spoilt, blocks, reference)
