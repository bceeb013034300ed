"""Mixtures of experts through ``hf-unified``: one projection at a time, whatever the version."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from trt_kd.architectures.shape import read_shape
from trt_kd.artifacts import Artifact, writing
from trt_kd.checkpoints import load_model, save_model
from trt_kd.config import StageConfig, build_plugin
from trt_kd.errors import ModelError
from trt_kd.exporters import EXPORTERS
from trt_kd.exporters.comparison import compare, logits_of
from trt_kd.exporters.hf_unified_reader import read_model
from trt_kd.quantization import FORMATS

LANE = EXPORTERS.load("hf-unified")()
MIXTURES = {
    "mixtral": ("model.layers.0.block_sparse_moe.experts.1", ("w1", "w3", "w2")),
    "qwen3_moe": ("model.layers.0.mlp.experts.1", ("gate_proj", "up_proj", "down_proj")),
}
FUSED = int(transformers.__version__.split(".")[0]) >= 5
BLOCKS = np.random.default_rng(1).integers(1, 90, (2, 24))


class Made(StageConfig):
    stage = "quantize"
    format: dict | None = None


@pytest.fixture(scope="module")
def checkpoint(families, tokenizer_dir, tmp_path_factory):
    """A tiny checkpoint of a family."""
    made = {}

    def make(family: str) -> Artifact:
        if family not in made:
            out = tmp_path_factory.mktemp("checkpoints") / family
            with writing(out, kind="checkpoint", config=Made(), inputs={}) as draft:
                save_model(families.tiny(family), draft.path, tokenizer_from=tokenizer_dir)
            made[family] = Artifact.open(out)
        return made[family]

    return make


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """Quantized artifact of a mixture, its logits and its export; write into copies only."""
    from trt_kd.quantization.calibration import calibrate
    from trt_kd.quantization.storage import save_quantized

    made = {}

    def make(family: str, kind: str):
        if (family, kind) not in made:
            source, root = checkpoint(family), tmp_path_factory.mktemp("mixtures")
            plugin = build_plugin(FORMATS, kind)
            model = load_model(source.path)
            kept = calibrate(model, plugin, BLOCKS)
            config = Made(format=plugin.model_dump())
            with writing(root / "q", kind="quantized", config=config, inputs={}) as draft:
                save_quantized(model, source, draft.path, kept)
            logits = list(logits_of(model, BLOCKS))
            (root / "e").mkdir()
            LANE.export(Artifact.open(root / "q"), root / "e")
            made[family, kind] = Artifact.open(root / "q"), logits, root / "e"
        return made[family, kind]

    return make


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_reads_back_the_same(checkpoint, family, tmp_path):
    source = checkpoint(family)
    LANE.export(source, tmp_path)
    assert LANE.problems(source, tmp_path) == []
    before = np.concatenate(list(logits_of(load_model(source.path), BLOCKS)))
    after = np.concatenate(list(logits_of(read_model(tmp_path), BLOCKS)))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["fp8", "fp8_per_channel_per_token", "int8_smoothquant"])
@pytest.mark.parametrize("family", MIXTURES)
def test_a_quantized_mixture_reads_back_as_it_was_simulated(exported, family, kind):
    source, logits, out = exported(family, kind)
    assert LANE.problems(source, out) == []
    found = compare(logits, logits_of(read_model(out), BLOCKS))
    plain = compare(logits, logits_of(load_model(source.path), BLOCKS))
    assert found.kl_nats < LANE.kl_limit_nats(source)
    assert found.kl_nats < plain.kl_nats, "nearer to the quantized model than to the plain one"


@pytest.mark.parametrize("kind", ["fp8", "fp8_per_channel_per_token", "int8_smoothquant"])
@pytest.mark.parametrize("family", MIXTURES)
def test_every_expert_is_low_bit_and_its_router_is_not(exported, family, kind):
    _, _, out = exported(family, kind)
    tensors, shape = load_file(out / "model.safetensors"), read_shape(out)
    expert, names = MIXTURES[family]
    block = expert.removesuffix(".1")
    for number in range(shape.experts):
        for name in names:
            weight = tensors[f"{block}.{number}.{name}.weight"]
            assert weight.dtype in (torch.float8_e4m3fn, torch.int8)
    router = tensors[f"{block.removesuffix('.experts')}.gate.weight"]
    assert router.dtype == torch.float32


def test_the_quantized_artifact_holds_no_second_copy_of_the_experts(exported):
    source, _, _ = exported("qwen3_moe", "fp8")
    weights = sum(t.numel() for t in load_file(source.path / "model.safetensors").values())
    kept = sum(t.numel() for t in load_file(source.path / "quantizers.safetensors").values())
    assert kept < 0.05 * weights


def swap_experts(tensors, expert, names):
    first, second = f"{expert}.{names[2]}.weight", f"{expert[:-1]}0.{names[2]}.weight"
    tensors[first], tensors[second] = tensors[second], tensors[first]


def scaled(part, factor):
    def change(tensors, expert, names):
        name = f"{expert}.{names[1]}.{part}"
        tensors[name] = tensors[name] * factor

    return change


FAULTS = {
    "two experts swapped": swap_experts,
    "an expert missing": lambda tensors, expert, names: tensors.pop(f"{expert}.{names[0]}.weight"),
    "a weight scale": scaled("weight_scale", 1.2),
    "an input scale": scaled("input_scale", 3.0),
    "no input scale": lambda tensors, expert, names: tensors.pop(
        f"{expert}.{names[2]}.input_scale"
    ),
    "gate and up swapped": lambda tensors, expert, names: tensors.update(
        {
            f"{expert}.{names[0]}.weight": tensors[f"{expert}.{names[1]}.weight"],
            f"{expert}.{names[1]}.weight": tensors[f"{expert}.{names[0]}.weight"],
        }
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("family", MIXTURES)
def test_a_planted_fault_in_one_expert_is_seen_in_the_files_alone(
    exported, family, fault, tmp_path
):
    source, _, good = exported(family, "fp8")
    for path in good.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(good / "model.safetensors")
    FAULTS[fault](tensors, *MIXTURES[family])
    save_file(tensors, tmp_path / "model.safetensors")
    assert LANE.problems(source, tmp_path) != []


@pytest.mark.parametrize("family", MIXTURES)
def test_an_expert_too_few_cannot_be_read(checkpoint, family, tmp_path):
    LANE.export(checkpoint(family), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    key = "num_experts" if "num_experts" in config else "num_local_experts"
    config |= dict.fromkeys(("num_experts", "num_local_experts"), config[key] + 1)
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"is missing|not as configured"):
        read_model(tmp_path)


def test_int4_experts_are_refused_by_the_plan_where_they_cannot_be_exported(checkpoint):
    shape = read_shape(checkpoint("qwen3_moe").path)
    form = build_plugin(FORMATS, {"kind": "int4_awq", "block_size": 64})
    found = LANE.check_format(shape, form)
    assert bool(found) == FUSED
    assert all("transformers 4" in problem for problem in found)
    assert LANE.check_format(replace(shape, experts=0, expert_ffn=0), form) == []
    (problem,) = LANE.check_format(shape, build_plugin(FORMATS, "fp8_block"))
    assert "experts in fp8_block are not exported" in problem
