"""The ONNX step: what it says about itself, what it generates, and planted faults."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.exporters.planting import in_graph
from trt_kd.architectures.shape import read_shape
from trt_kd.artifacts import Artifact, writing
from trt_kd.backends.onnxruntime import OnnxRuntime
from trt_kd.checkpoints import load_model, save_model
from trt_kd.config import StageConfig
from trt_kd.errors import MissingDependencyError, ModelError, VerificationError
from trt_kd.exporters.onnx import MODEL_TYPES, Onnx
from trt_kd.exporters.verification import source_logits, verify

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SIZES = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
OWN = {
    "gemma2": {"sliding_window": 8},
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
}
"""What a tiny model of a type has besides ``SIZES``: a window shorter than the texts below."""

PROMPTS = [[5, 9, 200, 33, 71], [17], [300, 41, 8, 90, 2, 7, 450, 66, 123, 4, 12], [1, 2, 3]]


class Made(StageConfig):
    stage = "import"


@pytest.fixture(scope="session")
def family(tmp_path_factory, tokenizer_dir):
    """Checkpoints of tiny random models by type, and their exports, made when asked for."""
    made: dict[str, tuple[Artifact, Path]] = {}

    def make(model_type: str) -> tuple[Artifact, Path]:
        if model_type not in made:
            folder = tmp_path_factory.mktemp(model_type)
            source = checkpoint(model_type, folder / "source", tokenizer_dir)
            (folder / "export").mkdir()
            Onnx().export(source, folder / "export")
            made[model_type] = source, folder / "export"
        return made[model_type]

    return make


def checkpoint(model_type: str, out: Path, tokenizer_dir: Path) -> Artifact:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES | OWN[model_type])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # norms and biases start as ones and zeros, which hides mistakes
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    with writing(out, kind="checkpoint", config=Made(), inputs={}) as draft:
        save_model(model, draft.path, tokenizer_from=tokenizer_dir)
    return Artifact.open(out)


def transformers_greedy(source: Artifact, prompts: list[list[int]], new_tokens: int) -> np.ndarray:
    """Greedy tokens of stock transformers, prompts padded on the left."""
    import torch

    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts])
    real = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    out = load_model(source.path, dtype="float32").generate(
        ids,
        attention_mask=real,
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0,
        eos_token_id=None,
    )
    return out[:, length:].numpy()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_family_keeps_its_logits(family, model_type, blocks):
    source, out = family(model_type)
    difference = verify(Onnx(), source, out, blocks, source_logits(source, blocks))
    assert difference.kl_nats < 1e-10
    assert difference.max_abs < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("batch", [1, 4])
def test_the_cache_carries_the_greedy_tokens_of_transformers(family, model_type, batch):
    source, out = family(model_type)
    with OnnxRuntime(threads=1).load(out) as session:
        found = session.generate(PROMPTS[:batch], 24)
    np.testing.assert_array_equal(found, transformers_greedy(source, PROMPTS[:batch], 24))


def test_padding_moves_no_logit(family):
    _, out = family("llama")
    with OnnxRuntime(threads=1).load(out) as session:
        alone = [session.generate([prompt], 12)[0] for prompt in PROMPTS]
        np.testing.assert_array_equal(session.generate(PROMPTS, 12), np.stack(alone))


def test_the_graph_is_standard_names_its_cache_and_is_loaded_without_a_word(family, capfd):
    _, out = family("llama")
    model = onnx.load(out / "model.onnx", load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert [i.name for i in model.graph.input][2:5] == [
        "position_ids",
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    assert [o.name for o in model.graph.output][-1] == "present.1.value"
    capfd.readouterr()
    with OnnxRuntime(threads=1).load(out) as session:
        session.generate(PROMPTS, 2)
    assert capfd.readouterr() == ("", "")


def test_no_path_and_nothing_needless_is_written(family):
    source, out = family("llama")
    names = {path.name for path in out.iterdir()}
    expected = {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json"}
    assert expected <= names <= expected | {"generation_config.json", "tokenizer_config.json"}
    assert (out / "tokenizer.json").read_bytes() == (source.path / "tokenizer.json").read_bytes()
    weights = read_shape(source.path).parameters * 4
    assert weights < (out / "model.onnx.data").stat().st_size < 1.1 * weights + 40 * 4096
    assert str(source.path.parent).encode() not in (out / "model.onnx").read_bytes()


@pytest.mark.slow
def test_half_precision_is_half_the_bytes_and_stays_within_its_limit(family, blocks, tmp_path):
    source, full = family("gemma2")
    lane = Onnx(precision="fp16")
    metrics = lane.export(source, tmp_path)
    assert metrics["weight_share_by_bits"] == {"16": 1.0}
    difference = verify(lane, source, tmp_path, blocks, source_logits(source, blocks))
    assert 0 < difference.kl_nats < 1e-5
    sizes = [(d / "model.onnx.data").stat().st_size for d in (tmp_path, full)]
    assert sizes[0] < 0.7 * sizes[1]


# --- planted faults -----------------------------------------------------------------------------


def in_json(name: str, **changes: object):
    def spoil(out: Path) -> None:
        path = out / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def tensor_of(graph, ending: str):
    return next(t for t in graph.initializer if t.name.endswith(ending))


def constant_of(graph, operator: str, before: str):
    """The constant that an operator adds to, or takes from, the result of another."""
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    small = {t.name: t for t in graph.initializer if not t.external_data}
    for node in graph.node:
        if node.op_type == operator and before in {made_by.get(name) for name in node.input}:
            for name in node.input:
                if name in small and onnx.numpy_helper.to_array(small[name]).size == 1:
                    return small[name]
    raise LookupError(operator)


def put(tensor, array) -> None:
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(array), tensor.name))


def scaled(ending: str, factor: float):
    def change(graph) -> None:
        tensor = tensor_of(graph, ending)
        put(tensor, (onnx.numpy_helper.to_array(tensor) * factor).astype(np.float32))

    return in_graph(change)


def constant(operator: str, before: str, value):
    def change(graph) -> None:
        tensor = constant_of(graph, operator, before)
        old = onnx.numpy_helper.to_array(tensor)
        put(tensor, np.asarray(value, dtype=old.dtype).reshape(old.shape))

    return in_graph(change)


def place(key: str, value: str):
    def change(graph) -> None:
        tensor = tensor_of(graph, "embed_tokens.weight")
        next(entry for entry in tensor.external_data if entry.key == key).value = value

    return in_graph(change)


def swapped_cache(graph) -> None:
    first, second = graph.input[3], graph.input[4]
    first.name, second.name = second.name, first.name


def other_dim(graph) -> None:
    graph.input[3].type.tensor_type.shape.dim[1].dim_value = 4


def fixed_batch(graph) -> None:
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def narrow_logits(graph) -> None:
    graph.output[0].type.tensor_type.shape.dim[2].dim_value = 511


def foreign_operator(graph) -> None:
    next(node for node in graph.node if node.op_type == "Softmax").domain = "com.microsoft"


def lost_weight(graph) -> None:
    tensor = tensor_of(graph, "layers.1.mlp.up_proj.weight.transposed")
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == tensor.name:
                node.input[index] = "renamed"
    tensor.name = "renamed"


def other_weight(out: Path) -> None:
    data = np.fromfile(out / "model.onnx.data", dtype=np.float32)
    data[: len(data) // 2] *= 1.05
    data.tofile(out / "model.onnx.data")


def truncated(out: Path) -> None:
    path = out / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:-4096])


FAULTS = {
    "rope base": scaled("inv_freq", 0.5),
    "norm epsilon": constant("Add", "ReduceMean", 1e-5),
    "norm weight": scaled("layers.1.input_layernorm.weight", 1.2),
    "query norm": scaled("q_norm.weight", 1.2),
    "window": constant("Sub", "Unsqueeze", 9),
    "data elsewhere": place("location", "../model.onnx.data"),
    "data of the root": place("location", "/etc/hostname"),
    "data beyond the end": place("length", "99999999"),
    "data of another tensor": place("offset", "4096"),
    "cache names": in_graph(swapped_cache),
    "cache heads": in_graph(other_dim),
    "fixed batch": in_graph(fixed_batch),
    "vocabulary": in_graph(narrow_logits),
    "operators": in_graph(foreign_operator),
    "lost weight": in_graph(lost_weight),
    "other weights": other_weight,
    "truncated data": truncated,
    "no data": lambda out: (out / "model.onnx.data").unlink(),
    "no graph": lambda out: (out / "model.onnx").write_bytes(b"not a graph"),
    "context": in_json("config.json", max_position_embeddings=64),
    "end of text": in_json("config.json", eos_token_id=7),
    "theta in config": in_json("config.json", rope_theta=5e5),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(family, blocks, tmp_path, fault):
    source, good = family("qwen3")
    out = tmp_path / "spoilt"
    shutil.copytree(good, out)
    FAULTS[fault](out)
    with pytest.raises((VerificationError, ModelError)):
        verify(Onnx(), source, out, blocks, source_logits(source, blocks))


def test_the_other_precision_is_seen(family, blocks):
    source, out = family("llama")
    with pytest.raises(VerificationError, match="float32, not float16"):
        verify(Onnx(precision="fp16"), source, out, blocks, source_logits(source, blocks))


# --- what is refused ----------------------------------------------------------------------------


def test_unknown_families_and_what_is_no_model_are_refused(teacher):
    shape = read_shape(teacher.path)
    assert Onnx().check(shape, "checkpoint") == []
    (problem,) = Onnx().check(replace(shape, model_type="mixtral"), "checkpoint")
    assert "'mixtral'; known: gemma2, llama" in problem
    (problem,) = Onnx().check(shape, "evaluation")
    assert "plain checkpoint" in problem


def test_a_rotation_that_changes_with_the_length_is_refused(teacher, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(teacher.path, source)
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    in_json("config.json", rope_parameters=rope)(source)
    with pytest.raises(ModelError, match="'dynamic' changes with the length"):
        Onnx().export(replace(teacher, path=source), tmp_path)


def test_an_operator_without_translation_is_named(tmp_path):
    import torch

    from trt_kd.exporters.onnx_translation import translate
    from trt_kd.exporters.onnx_writer import Graph

    class Odd(torch.nn.Module):
        def forward(self, x):
            return (torch.erfinv(x),)

    program = torch.export.export(Odd(), (torch.zeros(2),))
    with Graph(tmp_path) as graph, pytest.raises(ModelError, match=r"aten\.erfinv\.default"):
        translate(program, graph, ["x"])


def test_a_missing_package_names_its_extra(teacher, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(MissingDependencyError, match="onnx"):
        Onnx().export(teacher, tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match="onnxruntime"):
        OnnxRuntime().load(tmp_path)


def test_what_onnx_runtime_cannot_load_is_one_error(teacher, tmp_path):
    shutil.copyfile(teacher.path / "config.json", tmp_path / "config.json")
    with pytest.raises(ModelError, match="cannot be loaded by ONNX Runtime"):
        OnnxRuntime().load(tmp_path)


def test_empty_prompts_and_overlong_requests_are_refused(family):
    _, out = family("llama")
    with OnnxRuntime(threads=1).load(out) as session:
        for prompts in ([], [[1], []]):
            with pytest.raises(ValueError, match="must not be empty"):
                session.generate(prompts, 1)
        with pytest.raises(ModelError, match="exceed the model's context of 128"):
            session.generate([[1] * 120], 9)
