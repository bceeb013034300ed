"""Checkpoints of TensorRT-LLM: written, split over ranks, read back by other code, and spoilt."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from trt_kd.architectures.shape import read_shape
from trt_kd.artifacts import Artifact, writing
from trt_kd.checkpoints import load_tokenizer, save_model
from trt_kd.config import StageConfig
from trt_kd.errors import ModelError
from trt_kd.exporters.comparison import compare, logits_of
from trt_kd.exporters.trtllm_checkpoint import TrtllmCheckpoint
from trt_kd.exporters.trtllm_reader import read_model
from trt_kd.exporters.verification import source_logits, verify

SIZES = {
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "tie_word_embeddings": True,
}
ROPE = {"rope_type": "default", "rope_theta": 100000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {
    "llama": {"rms_norm_eps": 1e-5},
    "llama, untied": {"tie_word_embeddings": False},
    "llama, biases": {"attention_bias": True},
    "llama, llama3 rope": {"rope": LLAMA3},
    "llama, linear rope": {"rope": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama, odd vocabulary": {"vocab_size": 511},
    "mistral": {"sliding_window": None},
    "mistral, window": {"sliding_window": 64},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": False},
    "gemma2": {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 24},
}


class Made(StageConfig):
    stage = "import"


def build(name: str):
    """A tiny model whose norms and biases are not what a new model starts with."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    model_type = name.partition(",")[0]
    changes = dict(FAMILIES[name])
    rope = changes.pop("rope", ROPE)
    settings = SIZES | changes
    import transformers

    if int(transformers.__version__.partition(".")[0]) >= 5:
        settings |= {"rope_parameters": rope}
    else:
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        plain = scaling["rope_type"] == "default"
        settings |= {"rope_theta": rope["rope_theta"], "rope_scaling": None if plain else scaling}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or parameter_name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="session")
def checkpoint(tokenizer_dir, tmp_path_factory):
    """Checkpoint artifacts by family, each made when first asked for; do not write into them."""
    made: dict[str, Artifact] = {}

    def make(name: str) -> Artifact:
        if name not in made:
            out = tmp_path_factory.mktemp("checkpoints") / name.replace(", ", "-")
            with writing(out, kind="checkpoint", config=Made(), inputs={}) as draft:
                save_model(build(name), draft.path, tokenizer_from=tokenizer_dir)
            made[name] = Artifact.open(out)
        return made[name]

    return make


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(1, 500, (2, 48))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (3, 2)])
def test_every_family_reads_back_the_same_whatever_the_ranks(
    checkpoint, tokens, tmp_path, family, tp, pp
):
    source = checkpoint(family)
    lane = TrtllmCheckpoint(tensor_parallel=tp, pipeline_parallel=pp)
    assert lane.check(read_shape(source.path), "checkpoint") == []
    assert lane.check_source(source) == []
    lane.export(source, tmp_path)
    difference = verify(lane, source, tmp_path, tokens, source_logits(source, tokens))
    assert difference.kl_nats < 1e-9
    assert difference.max_abs < 1e-3
    assert len(list(tmp_path.glob("rank*.safetensors"))) == tp * pp


@pytest.mark.parametrize("tp", [2, 6])
def test_fewer_key_value_heads_than_ranks_are_copied(checkpoint, tokens, tmp_path, tp):
    source = checkpoint("llama")
    config = read_shape(source.path)
    one = replace(config, kv_heads=1)
    assert not TrtllmCheckpoint(tensor_parallel=tp).check(one, "checkpoint")
    lane = TrtllmCheckpoint(tensor_parallel=6)
    lane.export(source, tmp_path)
    qkv = "transformer.layers.0.attention.qkv.weight"
    first, second = (load_file(tmp_path / f"rank{n}.safetensors")[qkv] for n in (0, 1))
    assert first.shape == (3 * 16, 96)
    assert torch.equal(first[16:], second[16:])
    assert not torch.equal(first[:16], second[:16])
    assert (
        compare(source_logits(source, tokens), logits_of(read_model(tmp_path), tokens)).kl_nats
        < 1e-9
    )


def test_nine_heads_and_three_key_value_heads_take_one_and_three_ranks(teacher):
    shape = replace(
        read_shape(teacher.path), hidden=576, ffn=1536, heads=9, kv_heads=3, head_dim=64, layers=30
    )
    for tp in (1, 3):
        assert TrtllmCheckpoint(tensor_parallel=tp).check(shape, "quantized") == []
    (problem,) = TrtllmCheckpoint(tensor_parallel=2).check(shape, "checkpoint")
    assert problem == (
        "tensor_parallel 2: 9 query heads do not split evenly; 3 key-value heads neither split "
        "evenly nor copy evenly; legal: 1, 3, 9"
    )
    (problem,) = TrtllmCheckpoint(pipeline_parallel=4).check(shape, "checkpoint")
    assert problem.endswith("30 layers do not split evenly; legal: 1, 2, 3, 5, 6, 10, 15, 30")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "phi3"}, "phi3 models are not written"),
        ({"mlp_bias": True}, "biases of the MLP"),
        ({"model_type": "qwen3", "attention_bias": True}, "no biases in attention"),
        ({"head_dim": 20}, "multiples of 8"),
    ],
)
def test_what_the_format_does_not_define_is_refused(teacher, changes, reason):
    shape = replace(read_shape(teacher.path), **changes)
    assert reason in "".join(TrtllmCheckpoint().check(shape, "checkpoint"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "type 'yarn'"),
        ({"hidden_act": "relu"}, "activation 'relu'"),
        ({"partial_rotary_factor": 0.5}, "rotate in part"),
    ],
)
def test_settings_that_cannot_be_told_are_refused_before_weights_are_read(
    teacher, tmp_path, changes, reason
):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(teacher.path, source)
    (source / "model.safetensors").unlink()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changes))
    artifact = Artifact.open(source)
    assert reason in "".join(TrtllmCheckpoint().check_source(artifact))
    out.mkdir()
    with pytest.raises(ModelError, match=reason):
        TrtllmCheckpoint().export(artifact, out)
    assert not list(out.iterdir())


def test_a_format_that_is_not_written_is_refused(quantized):
    (problem,) = TrtllmCheckpoint().check_source(quantized("mixed"))
    assert problem.startswith("format mixed is not written by trtllm-checkpoint; those that are")


def test_config_json_says_what_defaults_would_get_wrong(checkpoint, tmp_path):
    TrtllmCheckpoint(tensor_parallel=3).export(checkpoint("qwen3"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    expected = {
        "architecture": "Qwen3ForCausalLM",
        "qwen_type": "qwen3",
        "rotary_base": 100000.0,
        "rotary_scaling": None,
        "head_size": 16,
        "attn_bias": False,
        "qk_layernorm": True,
        "norm_epsilon": 1e-6,
        "share_embedding_table": False,
        "use_parallel_embedding": True,
        "mapping": {"world_size": 3, "tp_size": 3, "pp_size": 1},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
    }
    assert expected.items() <= config.items()


def test_a_window_ends_the_sequences_because_checkpoints_have_none(checkpoint, tmp_path):
    TrtllmCheckpoint().export(checkpoint("mistral, window"), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["max_position_embeddings"] == 64


def test_a_tied_head_is_written_only_where_the_embedding_is_elsewhere(checkpoint, tmp_path):
    for pp, ranks in ((1, {0: False}), (2, {0: False, 1: True})):
        out = tmp_path / str(pp)
        out.mkdir()
        TrtllmCheckpoint(pipeline_parallel=pp).export(checkpoint("llama"), out)
        for rank, holds in ranks.items():
            assert ("lm_head.weight" in load_file(out / f"rank{rank}.safetensors")) is holds


def test_gemma_norms_are_stored_with_their_one(checkpoint, tmp_path):
    source = checkpoint("gemma2")
    TrtllmCheckpoint().export(source, tmp_path)
    before = load_file(source.path / "model.safetensors")["model.norm.weight"]
    assert torch.equal(
        load_file(tmp_path / "rank0.safetensors")["transformer.ln_f.weight"], before + 1
    )


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_stay_within_the_limit(checkpoint, tokens, tmp_path, family, dtype):
    source = checkpoint(family)
    lane = TrtllmCheckpoint(dtype=dtype)
    lane.export(source, tmp_path)
    difference = verify(lane, source, tmp_path, tokens, source_logits(source, tokens))
    assert 0 < difference.kl_nats < lane.kl_limit_nats(source) == 1e-6 + 0.02


def test_the_tokenizer_loads_beside_the_checkpoint(checkpoint, tmp_path):
    source = checkpoint("llama")
    TrtllmCheckpoint().export(source, tmp_path)
    text = "Open the file, read every line."
    expected = load_tokenizer(source.path)(text)["input_ids"]
    assert load_tokenizer(tmp_path)(text)["input_ids"] == expected


# Low-bit checkpoints.

ALGORITHMS = {
    "fp8": "FP8",
    "int8": "W8A8_SQ_PER_CHANNEL",
    "int8_smoothquant": "W8A8_SQ_PER_CHANNEL",
}


@pytest.mark.parametrize("name", ["fp8 with cache", "int8_smoothquant with cache"])
def test_a_cache_in_fp8_has_one_scale_the_larger_of_keys_and_values(quantized, tmp_path, name):
    from trt_kd.quantization.storage import QUANTIZERS

    source = quantized(name)
    metrics = TrtllmCheckpoint(tensor_parallel=2).export(source, tmp_path)
    assert metrics["kv_cache_quant_algo"] == "FP8"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization"]["kv_cache_quant_algo"] == "FP8"
    seen = load_file(source.path / QUANTIZERS)
    written = load_file(tmp_path / "rank1.safetensors")
    for layer in range(4):
        prefix = f"model.layers.{layer}.self_attn"
        largest = max(seen[f"{prefix}.{part}_bmm_quantizer._amax"].item() for part in "kv")
        scale = written[f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"]
        assert scale.item() == pytest.approx(largest / 448, rel=1e-6)


@pytest.mark.parametrize("name", [*ALGORITHMS, "fp8 with cache"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_low_bits_read_back_within_the_limit(quantized, blocks, tmp_path, name, tp, pp):
    source = quantized(name)
    lane = TrtllmCheckpoint(tensor_parallel=tp, pipeline_parallel=pp)
    metrics = lane.export(source, tmp_path)
    assert metrics["quant_algo"] == ALGORITHMS[name.split()[0]]
    assert metrics["realised_low_bit_share"] > 0.5
    difference = verify(lane, source, tmp_path, blocks, source_logits(source, blocks))
    assert difference.kl_nats < lane.kl_limit_nats(source)


def test_low_bits_are_the_same_model_whatever_the_ranks(quantized, blocks, tmp_path):
    logits = []
    for tp in (1, 2, 4):
        out = tmp_path / str(tp)
        out.mkdir()
        TrtllmCheckpoint(tensor_parallel=tp).export(quantized("int8_smoothquant"), out)
        logits.append(list(logits_of(read_model(out), blocks)))
    for other in logits[1:]:
        np.testing.assert_array_equal(logits[0], other)
