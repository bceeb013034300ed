"""Faults planted in TensorRT-LLM checkpoints, one field or tensor each: every one must be seen."""

import shutil

import pytest
import torch

from tests.exporters.planting import setting, tensors, without
from trt_kd.errors import VerificationError
from trt_kd.exporters.trtllm_checkpoint import TrtllmCheckpoint
from trt_kd.exporters.verification import source_logits, verify

LANE = TrtllmCheckpoint(tensor_parallel=2, pipeline_parallel=2)
LAYER = "transformer.layers.1"
QKV, DENSE, PROJ = (f"{LAYER}.{name}" for name in ("attention.qkv", "attention.dense", "mlp.proj"))


def scaled(name, factor, rank=0):
    return tensors(lambda t: t.update({name: t[name] * factor}), rank)


def swapped(first, second):
    def plant(out):
        one, other = (out / f"rank{n}.safetensors" for n in (first, second))
        one.rename(out / "aside")
        other.rename(one)
        (out / "aside").rename(other)

    return plant


def exchanged(one, other):
    """A fault that gives two tensors each other's names."""
    return tensors(lambda t: t.update({one: t[other], other: t[one]}))


SETTINGS = {
    "rotary base": setting("rotary_base", value=500000.0),
    "rotary base left out": without("rotary_base"),
    "rotary scaling": setting(
        "rotary_scaling", value={"type": "linear", "rope_type": "linear", "factor": 2.0}
    ),
    "rotary scaling left out": without("rotary_scaling"),
    "rotary dimension": setting("rotary_embedding_dim", value=8),
    "misspelt rotary base": setting("rotary_bse", value=10000.0),
    "norm epsilon": setting("norm_epsilon", value=1e-5),
    "head size": setting("head_size", value=32),
    "query heads": setting("num_attention_heads", value=8),
    "key-value heads": setting("num_key_value_heads", value=4),
    "layers": setting("num_hidden_layers", value=2),
    "hidden size": setting("hidden_size", value=128),
    "MLP size": setting("intermediate_size", value=64),
    "vocabulary": setting("vocab_size", value=500),
    "positions": setting("max_position_embeddings", value=2048),
    "activation": setting("hidden_act", value="gelu"),
    "position embedding": setting("position_embedding_type", value="learned_absolute"),
    "tie of the embeddings": setting("share_embedding_table", value=False),
    "attention bias": setting("attn_bias", value=True),
    "MLP bias": setting("mlp_bias", value=True),
    "norms of query and key": setting("qk_layernorm", value=True),
    "parallel embedding": setting("use_parallel_embedding", value=False),
    "sharding of the embedding": setting("embedding_sharding_dim", value=1),
    "architecture": setting("architecture", value="Qwen2ForCausalLM"),
    "unknown architecture": setting("architecture", value="LlamaForCausalLm"),
    "dtype": setting("dtype", value="bfloat16"),
    "dtype of the logits": setting("logits_dtype", value="float16"),
    "tensor parallel ranks": setting("mapping", "tp_size", value=1),
    "world": setting("mapping", "world_size", value=2),
    "split of the ranks": setting("mapping", value={"world_size": 4, "tp_size": 4, "pp_size": 1}),
    "algorithm": setting("quantization", "quant_algo", value="FP8_PER_CHANNEL_PER_TOKEN"),
    "no algorithm": setting("quantization", "quant_algo", value=None),
    "cache without scales": setting("quantization", "kv_cache_quant_algo", value="FP8"),
    "group size": setting("quantization", "group_size", value=64),
    "excluded modules": setting("quantization", "exclude_modules", value=["lm_head", "*mlp*"]),
}

TENSORS = {
    "ranks swapped": swapped(0, 1),
    "stages swapped": swapped(0, 2),
    "rank missing": lambda out: (out / "rank3.safetensors").unlink(),
    "rank too many": lambda out: shutil.copyfile(
        out / "rank0.safetensors", out / "rank4.safetensors"
    ),
    "truncated": lambda out: (out / "rank1.safetensors").write_bytes(
        (out / "rank1.safetensors").read_bytes()[:-8]
    ),
    "layers swapped": exchanged(
        "transformer.layers.0.mlp.proj.weight", "transformer.layers.1.mlp.proj.weight"
    ),
    "branches of the MLP swapped": exchanged(f"{LAYER}.mlp.fc.weight", f"{LAYER}.mlp.gate.weight"),
    "norm": scaled(f"{LAYER}.input_layernorm.weight", 1.01),
    "norms of two ranks differ": scaled(f"{LAYER}.post_layernorm.weight", 1.01, rank=1),
    "last norm": scaled("transformer.ln_f.weight", 1.01, rank=2),
    "embedding": tensors(
        lambda t: t.update(
            {"transformer.vocab_embedding.weight": t["transformer.vocab_embedding.weight"].flip(0)}
        )
    ),
    "head": scaled("lm_head.weight", 1.01, rank=3),
    "input scale": scaled(f"{PROJ}.activation_scaling_factor", 1.1),
    "input scale of zero": scaled(f"{PROJ}.activation_scaling_factor", 0.0),
    "input scale is no number": scaled(f"{PROJ}.activation_scaling_factor", float("nan")),
    "weight scale of one rank": scaled(f"{DENSE}.weights_scaling_factor", 1.1, rank=1),
    "weight scale missing": tensors(lambda t: t.pop(f"{DENSE}.weights_scaling_factor")),
    "misspelt scale": tensors(
        lambda t: t.update({f"{DENSE}.scaling_factor": t.pop(f"{DENSE}.weights_scaling_factor")})
    ),
    "weight missing": tensors(lambda t: t.pop(f"{DENSE}.weight")),
    "weight of another type": tensors(
        lambda t: t.update({f"{DENSE}.weight": t[f"{DENSE}.weight"].float()})
    ),
    "misshapen scale": tensors(
        lambda t: t.update({f"{PROJ}.activation_scaling_factor": torch.ones(2)})
    ),
    "other tokenizer": lambda out: (out / "tokenizer.json").write_text("{}"),
    "no generation settings": lambda out: (out / "generation_config.json").unlink(),
}


def every_rank(name, factor):
    """A fault that both ranks of the first stage share."""

    def plant(out):
        for rank in (0, 1):
            scaled(name, factor, rank)(out)

    return plant


FP8_ONLY = {
    "scale of query, key and value": every_rank(f"{QKV}.weights_scaling_factor", 1.03),
    "scale of the fused input": every_rank(f"{QKV}.activation_scaling_factor", 0.5),
}
INT8_ONLY = {
    "scale of one channel": tensors(lambda t: t[f"{QKV}.weights_scaling_factor"][5:6].mul_(1.1)),
    "smoothing": every_rank(f"{QKV}.prequant_scaling_factor", 1.1),
    "smoothing of one channel": tensors(
        lambda t: t[f"{PROJ}.prequant_scaling_factor"][3:4].mul_(2)
    ),
    "smoothing missing": tensors(lambda t: t.pop(f"{PROJ}.prequant_scaling_factor")),
}
CACHE = f"{LAYER}.attention.kv_cache_scaling_factor"
CACHE_ONLY = {
    "scale of the cache": every_rank(CACHE, 1.1),
    "scale of the cache on one rank": scaled(CACHE, 1.1, rank=1),
    "scale of the cache is zero": every_rank(CACHE, 0.0),
    "scale of the cache missing": tensors(lambda t: t.pop(CACHE)),
    "misshapen scale of the cache": tensors(lambda t: t.update({CACHE: torch.ones(2)})),
    "no cache": setting("quantization", "kv_cache_quant_algo", value=None),
    "another cache": setting("quantization", "kv_cache_quant_algo", value="INT8"),
    "no word of the cache": without("quantization", "kv_cache_quant_algo"),
}
FAULTS = {
    "fp8 with cache": CACHE_ONLY,
    "int8_smoothquant with cache": CACHE_ONLY,
    "fp8": SETTINGS | TENSORS | FP8_ONLY,
    "int8_smoothquant": {"rotary base": SETTINGS["rotary base"], **INT8_ONLY, **TENSORS},
}
CASES = [(name, fault) for name, faults in FAULTS.items() for fault in faults]


@pytest.fixture(scope="module")
def good(quantized, blocks, tmp_path_factory):
    """A good export by format, with its source and the source's logits."""
    made = {}

    def make(name):
        if name not in made:
            out = tmp_path_factory.mktemp("good") / name
            out.mkdir()
            source = quantized(name)
            LANE.export(source, out)
            made[name] = source, out, source_logits(source, blocks)
        return made[name]

    return make


@pytest.mark.parametrize("name", FAULTS)
def test_a_good_checkpoint_passes(good, blocks, name):
    source, out, reference = good(name)
    verify(LANE, source, out, blocks, reference)


@pytest.mark.parametrize(("name", "fault"), CASES)
def test_a_planted_fault_is_seen(good, blocks, tmp_path, name, fault):
    source, out, reference = good(name)
    spoilt = tmp_path / "spoilt"
    shutil.copytree(out, spoilt)
    FAULTS[name][fault](spoilt)
    with pytest.raises(VerificationError):
        verify(LANE, source, spoilt, blocks, reference)


@pytest.mark.parametrize("fault", ["rotary base", "norm epsilon", "rotary scaling"])
def test_a_wrong_setting_moves_the_logits_even_where_no_one_compares_settings(
    good, blocks, tmp_path, fault
):
    from trt_kd.exporters.comparison import compare, logits_of
    from trt_kd.exporters.trtllm_reader import read_model

    _, out, _ = good("fp8")
    spoilt = tmp_path / "spoilt"
    shutil.copytree(out, spoilt)
    SETTINGS[fault](spoilt)
    before, after = (logits_of(read_model(folder), blocks) for folder in (out, spoilt))
    assert compare(before, after).max_abs > 1e-5
