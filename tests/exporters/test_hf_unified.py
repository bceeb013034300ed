"""Unified checkpoints: what Model Optimizer writes, repaired, read back by other code."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from trt_kd.backends import BACKENDS
from trt_kd.errors import ModelError, VerificationError
from trt_kd.exporters import EXPORTERS
from trt_kd.exporters.comparison import compare, logits_of
from trt_kd.exporters.hf_unified_files import weight_share_by_bits
from trt_kd.exporters.hf_unified_reader import read_model
from trt_kd.exporters.verification import source_logits, verify

LANE = EXPORTERS.load("hf-unified")()
ALGORITHMS = {
    "fp8": "FP8",
    "fp8_per_channel_per_token": "FP8_PER_CHANNEL_PER_TOKEN",
    "w4a8_awq": "W4A8_AWQ",
    "int8_smoothquant": "W8A8_SQ_PER_CHANNEL",
    "int8": "W8A8_SQ_PER_CHANNEL",
    "int4_awq": "W4A16_AWQ",
    "fp8_cache": "FP8",
    "mixed": "MIXED_PRECISION",
    "int8_smoothquant with cache": "W8A8_SQ_PER_CHANNEL",
    "int4_awq with cache": "W4A16_AWQ",
}
CACHED = ("fp8_cache", "fp8 with cache", "int8_smoothquant with cache", "int4_awq with cache")


@pytest.fixture(scope="session", params=list(ALGORITHMS))
def made(request, quantized, tmp_path_factory):
    """The format's name, its quantized artifact and the export; do not write into it."""
    out = tmp_path_factory.mktemp("unified") / request.param
    out.mkdir()
    source = quantized(request.param)
    metrics = LANE.export(source, out)
    cache = "FP8" if request.param in CACHED else None
    assert metrics["quant_algo"] == ALGORITHMS[request.param]
    assert metrics["kv_cache_quant_algo"] == cache
    return request.param, source, out


@pytest.fixture(scope="session")
def good(quantized, blocks, reference, tmp_path_factory):
    """An FP8 export without fault."""
    source, out = quantized("fp8"), tmp_path_factory.mktemp("good")
    LANE.export(source, out)
    verify(LANE, source, out, blocks, reference)
    return out


@pytest.fixture
def fp8(quantized, good, tmp_path):
    """An FP8 export to spoil, with its source."""
    return quantized("fp8"), Path(shutil.copytree(good, tmp_path / "fp8"))


@pytest.fixture(scope="session")
def reference(quantized, blocks):
    """Logits of the source of the FP8 export."""
    return source_logits(quantized("fp8"), blocks)


def test_an_export_has_nothing_against_it(made):
    _, source, out = made
    assert LANE.problems(source, out) == []


def test_the_reader_agrees_with_the_fake_quantized_model(made, blocks):
    _, source, out = made
    difference = verify(LANE, source, out, blocks, source_logits(source, blocks))
    assert difference.kl_nats < LANE.kl_limit_nats(source)
    assert difference.tokens == blocks.size


def test_the_reader_sees_the_quantization(made, teacher, blocks):
    _, _, out = made
    original = source_logits(teacher, blocks)
    assert compare(original, logits_of(read_model(out), blocks)).kl_nats > 1e-5


def test_both_spellings_of_rope_and_an_explicit_head_size(made, teacher):
    _, _, out = made
    config = json.loads((out / "config.json").read_text())
    source = json.loads((teacher.path / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["head_dim"] == 16
    quantization = config.pop("quantization_config")
    assert config == source
    assert quantization["quant_method"] == "modelopt"


def test_tokenizer_and_generation_settings_are_the_source_s(made, teacher):
    _, _, out = made
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (teacher.path / name).read_bytes()


def test_a_tied_model_ships_one_table(made):
    _, _, out = made
    names = load_file(out / "model.safetensors")
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_no_path_of_this_machine_is_in_the_export(made):
    _, source, out = made
    for path in out.glob("*.json"):
        assert str(source.path.parent) not in path.read_text(encoding="utf-8")


def test_a_checkpoint_is_copied_and_reads_back_the_same(teacher, blocks, tmp_path):
    told = LANE.export(teacher, tmp_path)
    assert told["quant_algo"] is told["kv_cache_quant_algo"] is None
    assert told["weight_share_by_bits"] == {"32": 1.0}
    difference = verify(LANE, teacher, tmp_path, blocks, source_logits(teacher, blocks))
    assert difference.kl_nats < 1e-9
    assert difference.top1_agreement == 1.0


def test_an_untied_model_keeps_both_tables(make_model, tokenizer_dir, blocks, tmp_path):
    from trt_kd.checkpoints import save_model

    model = make_model(tie_word_embeddings=False)
    save_model(model, tmp_path, tokenizer_from=tokenizer_dir)
    assert compare(logits_of(model, blocks), logits_of(read_model(tmp_path), blocks)).kl_nats < 1e-9


def test_the_share_of_every_precision_is_that_of_the_stored_weights(made):
    name, _, out = made
    tensors = load_file(out / "model.safetensors")
    matrices = [key for key in tensors if tensors[key].ndim == 2 and key.endswith(".weight")]
    packed = {key: 2 if tensors[key].dtype == torch.uint8 else 1 for key in matrices}
    total = sum(tensors[key].numel() * packed[key] for key in matrices)
    shares = weight_share_by_bits(out)
    for bits, types in {
        "4": [torch.uint8],
        "8": [torch.int8, torch.float8_e4m3fn],
        "32": [torch.float32],
    }.items():
        some = [key for key in matrices if tensors[key].dtype in types]
        share = sum(tensors[key].numel() * packed[key] for key in some) / total
        assert shares.get(bits, 0.0) == pytest.approx(share), name
    assert sum(shares.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["quantized", "checkpoint"])
def test_check_takes_what_it_can_export(kind, teacher):
    from trt_kd.architectures.shape import read_shape

    assert LANE.check(read_shape(teacher.path), kind) == []
    assert LANE.check(read_shape(teacher.path), "report")


def test_the_reader_decodes(made):
    _, _, out = made
    backend = BACKENDS.load(LANE.backend)()
    with backend.load(out) as session:
        assert session.vocab_size == 512
        assert session.logits(np.ones((2, 5), dtype=np.int64)).shape == (2, 5, 512)
        assert len(list(session.steps([[1, 2, 3]], 4))) == 4


# Faults planted in an export: each must be seen before an artifact stands.


def change_config(out, **changes):
    path = out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(out, change):
    path = out / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


DOWN = "model.layers.1.mlp.down_proj"


def untie(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].roll(1, 0)


FAULTS = {
    "rope_theta": lambda out: change_config(out, rope_theta=500000.0),
    "rope_parameters": lambda out: change_config(
        out, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    ),
    "rms_norm_eps": lambda out: change_config(out, rms_norm_eps=1e-5),
    "tie_word_embeddings": lambda out: change_config(out, tie_word_embeddings=False),
    "head is not the embedding": lambda out: change_tensors(out, untie),
    "weight scale": lambda out: change_tensors(out, lambda t: t[f"{DOWN}.weight_scale"].mul_(1.1)),
    "input scale": lambda out: change_tensors(out, lambda t: t[f"{DOWN}.input_scale"].mul_(3)),
    "scale of zero": lambda out: change_tensors(out, lambda t: t[f"{DOWN}.input_scale"].zero_()),
    "scale is not a number": lambda out: change_tensors(
        out, lambda t: t[f"{DOWN}.input_scale"].fill_(float("nan"))
    ),
    "missing tensor": lambda out: change_tensors(out, lambda t: t.pop(f"{DOWN}.weight")),
    "missing scale": lambda out: change_tensors(out, lambda t: t.pop(f"{DOWN}.weight_scale")),
    "missing input scale": lambda out: change_tensors(out, lambda t: t.pop(f"{DOWN}.input_scale")),
    "tensor too many": lambda out: change_tensors(
        out, lambda t: t.update({"model.extra.weight": torch.zeros(2)})
    ),
    "norm": lambda out: change_tensors(out, lambda t: t["model.norm.weight"].mul_(1.01)),
    "shape": lambda out: change_tensors(
        out, lambda t: t.update({"model.norm.weight": torch.ones(63)})
    ),
    "truncated": lambda out: (out / "model.safetensors").write_bytes(
        (out / "model.safetensors").read_bytes()[:-9]
    ),
    "no hf_quant_config": lambda out: (out / "hf_quant_config.json").unlink(),
    "other tokenizer": lambda out: (out / "tokenizer.json").write_text("{}"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fp8, blocks, reference, fault):
    source, out = fp8
    FAULTS[fault](out)
    with pytest.raises(VerificationError):
        verify(LANE, source, out, blocks, reference)


def test_another_group_size_than_the_tensors_have_is_seen(quantized, tmp_path):
    source, out = quantized("int4_awq"), tmp_path / "awq"
    out.mkdir()
    LANE.export(source, out)
    assert LANE.problems(source, out) == []
    path = out / "hf_quant_config.json"
    settings = json.loads(path.read_text())
    settings["quantization"]["group_size"] = 128
    path.write_text(json.dumps(settings))
    assert "has groups of 64, hf_quant_config.json says 128" in LANE.problems(source, out)[0]


def alone(layers):
    """A quantized matrix that no runtime fuses with another."""
    return next(name for name in layers if name.endswith(("o_proj", "down_proj")))


MIXED_FAULTS = {
    "a layer's format": lambda layers: layers[alone(layers)].update(
        quant_algo="W8A8_SQ_PER_CHANNEL"
    ),
    "a layer left out": lambda layers: layers.pop(alone(layers)),
    "a layer too many": lambda layers: layers.update({"model.extra": layers[alone(layers)]}),
    "an algorithm nobody knows": lambda layers: layers[alone(layers)].update(quant_algo="W3A3"),
    "a group size": lambda layers: [
        layer.update(group_size=32) for layer in layers.values() if "group_size" in layer
    ],
}


def change_layers(out, change, names=("config.json", "hf_quant_config.json", "quant_cfg.json")):
    """Plant a fault in what the files ``names`` say of single layers."""
    sections = {"config.json": "quantization_config", "hf_quant_config.json": "quantization"}
    for name in names:
        settings = json.loads((out / name).read_text())
        place = settings[sections[name]] if name in sections else settings
        change(place["quantized_layers"])
        (out / name).write_text(json.dumps(settings))


@pytest.fixture
def mixed(quantized, tmp_path):
    """An export of mixed precision to spoil, with its source."""
    source, out = quantized("mixed"), tmp_path / "mixed"
    out.mkdir()
    LANE.export(source, out)
    return source, out


def test_mixed_precision_tells_the_format_of_every_layer(mixed):
    """What stands in the file is what the search chose, and the tensors are stored so."""
    source, out = mixed
    told = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert told["quant_algo"] == "MIXED_PRECISION"
    assert json.loads((out / "quant_cfg.json").read_text()) == told
    chosen = source.manifest.metrics["layer_formats"]
    assert {"fp8", "int4_awq block_size=64"} <= set(chosen.values())
    for module, name in chosen.items():
        layer = told["quantized_layers"].get(module)
        if name == "none":
            assert layer is None
        else:
            assert layer["quant_algo"] == ALGORITHMS[name.split()[0]]
            assert layer.get("group_size") == (64 if name.startswith("int4") else None)


@pytest.mark.parametrize("fault", MIXED_FAULTS)
@pytest.mark.parametrize("where", ["everywhere", "quant_cfg.json"])
def test_a_planted_fault_of_a_single_layer_is_seen(mixed, fault, where):
    source, out = mixed
    given = {} if where == "everywhere" else {"names": (where,)}
    change_layers(out, MIXED_FAULTS[fault], **given)
    assert LANE.problems(source, out) != []


def test_fused_matrices_of_different_formats_are_refused(mixed):
    _, out = mixed

    def part(layers):
        up = next(name for name in layers if name.endswith("up_proj"))
        layers.pop(up.replace("up_proj", "gate_proj"))

    change_layers(out, part)
    with pytest.raises(ModelError, match="a runtime fuses them"):
        read_model(out)


def no_cache(out):
    for name, section, key in (
        ("config.json", "quantization_config", "kv_cache_scheme"),
        ("hf_quant_config.json", "quantization", "kv_cache_quant_algo"),
    ):
        settings = json.loads((out / name).read_text())
        settings[section].pop(key)
        (out / name).write_text(json.dumps(settings))


KEYS = "model.layers.1.self_attn.k_proj.k_scale"
CACHE_FAULTS = {
    "scale": lambda out: change_tensors(out, lambda t: t[KEYS].mul_(1.1)),
    "no scale": lambda out: change_tensors(out, lambda t: t.pop(KEYS)),
    "swapped": lambda out: change_tensors(
        out, lambda t: t.update({KEYS: t[KEYS.replace("k_", "v_")].clone()})
    ),
    "no cache": no_cache,
    "another cache": lambda out: change_config(
        out,
        quantization_config=json.loads((out / "config.json").read_text())["quantization_config"]
        | {"kv_cache_scheme": {"dynamic": False, "num_bits": 4, "type": "float"}},
    ),
}


@pytest.fixture(scope="module")
def with_cache(quantized, tmp_path_factory):
    """Exports without fault that tell of an FP8 cache, by format; do not write into them."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = quantized(name), tmp_path_factory.mktemp("cache")
            LANE.export(*made[name])
            assert LANE.problems(*made[name]) == []
        return made[name]

    return make


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("fault", CACHE_FAULTS)
def test_a_planted_fault_of_the_cache_is_seen(with_cache, tmp_path, name, fault):
    source, good = with_cache(name)
    out = Path(shutil.copytree(good, tmp_path / "cache"))
    CACHE_FAULTS[fault](out)
    assert LANE.problems(source, out) != []


@pytest.mark.parametrize("name", CACHED)
def test_both_descriptions_tell_of_the_cache_as_runtimes_read_it(with_cache, name):
    _, out = with_cache(name)
    inline = json.loads((out / "config.json").read_text())["quantization_config"]
    assert inline["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    separate = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert separate["kv_cache_quant_algo"] == "FP8"
    tensors = load_file(out / "model.safetensors")
    for layer in range(4):
        for part in "kv":
            scale = tensors[f"model.layers.{layer}.self_attn.{part}_proj.{part}_scale"]
            assert scale.dtype == torch.float32
            assert scale.numel() == 1


def test_a_cache_that_nobody_asked_for_is_seen(fp8):
    source, out = fp8
    scheme = {"dynamic": False, "num_bits": 8, "type": "float"}
    for name, section, told in (
        ("config.json", "quantization_config", {"kv_cache_scheme": scheme}),
        ("hf_quant_config.json", "quantization", {"kv_cache_quant_algo": "FP8"}),
    ):
        settings = json.loads((out / name).read_text())
        settings[section] |= told
        (out / name).write_text(json.dumps(settings))
    assert LANE.problems(source, out) == [
        "the key-value cache is said to be in FP8, asked for was None"
    ]


def test_an_input_scale_too_small_shows_in_the_logits_alone(fp8, blocks):
    source, out = fp8
    change_tensors(out, lambda t: [t[n].mul_(0.2) for n in t if n.endswith("input_scale")])
    logits = logits_of(read_model(out), blocks)
    assert compare(source_logits(source, blocks), logits).kl_nats > LANE.kl_limit_nats(source)


def test_two_descriptions_that_disagree_are_refused(fp8):
    _, out = fp8
    path = out / "hf_quant_config.json"
    path.write_text(path.read_text().replace('"FP8"', '"NVFP4"'))
    with pytest.raises(ModelError, match="NVFP4"):
        read_model(out)


def test_a_layer_said_to_be_excluded_must_not_have_scales(fp8):
    _, out = fp8
    for name in ("config.json", "hf_quant_config.json"):
        path = out / name
        path.write_text(path.read_text().replace('"lm_head"', '"lm_head", "*.o_proj"'))
    with pytest.raises(ModelError, match="excluded"):
        read_model(out)


def test_the_source_is_left_as_it_was(quantized, tmp_path):
    source = quantized("fp8")
    LANE.export(source, tmp_path)
    source.verify()
    shutil.rmtree(tmp_path)
