"""Quantized ONNX steps: the source's own scales, followed from input to product, and spoilt."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.exporters.planting import in_graph
from trt_kd.architectures.shape import read_shape
from trt_kd.artifacts import Artifact, writing
from trt_kd.backends.onnxruntime import OnnxRuntime
from trt_kd.checkpoints import load_model
from trt_kd.config import StageConfig, build_plugin
from trt_kd.errors import ModelError, VerificationError
from trt_kd.exporters import EXPORTERS
from trt_kd.exporters.comparison import compare, logits_of
from trt_kd.exporters.onnx import LOW_BIT_TYPES, Onnx
from trt_kd.exporters.onnx_graph import weights_by_bits
from trt_kd.exporters.verification import source_logits, verify
from trt_kd.quantization import FORMATS
from trt_kd.quantization.calibration import calibrate
from trt_kd.quantization.storage import QUANTIZERS, load_quantized, save_quantized

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

BITS = {"fp8": 8, "int8": 8, "int8_smoothquant": 8, "int4_awq": 4}
PROJ = "model.layers.1.mlp.down_proj"
QUERY = "model.layers.1.self_attn.q_proj"


class Made(StageConfig):
    stage = "quantize"
    format: dict


def calibrated(plain, form, blocks, out):
    """The quantized artifact ``out``, made from the checkpoint ``plain``."""
    plugin, model = build_plugin(FORMATS, form), load_model(plain.path)
    before = list(logits_of(model, blocks))
    kept = calibrate(model, plugin, blocks)
    config = Made(format=plugin.model_dump())
    with writing(out, kind="quantized", config=config, inputs={}) as draft:
        save_quantized(model, plain, draft.path, kept)
        draft.metrics["kl_to_source_nats"] = compare(before, logits_of(model, blocks)).kl_nats
    return Artifact.open(out)


@pytest.fixture(scope="module")
def exported(make_student, blocks, tmp_path_factory):
    """Source, export and metrics by format; those of the plain source under ``none``."""
    plain, made = make_student(noise=0.0, num_hidden_layers=2), {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("qdq")
            form = {"kind": name, "block_size": 64} if name == "int4_awq" else name
            source = plain if name == "none" else calibrated(plain, form, blocks, folder / "q")
            (folder / "e").mkdir()
            made[name] = source, folder / "e", Onnx().export(source, folder / "e")
        return made[name]

    return make


def graph_of(out: Path):
    return onnx.load(out / "model.onnx", load_external_data=False).graph


@pytest.mark.slow
@pytest.mark.parametrize("name", LOW_BIT_TYPES)
def test_the_graph_is_the_quantized_model(exported, blocks, name):
    """Logits are those of the simulated model, but for inputs that lie halfway between two codes:

    the simulation multiplies by the reciprocal of the scale, the operator divides by the scale.
    """
    source, out, _ = exported(name)
    difference = verify(Onnx(), source, out, blocks, source_logits(source, blocks))
    assert difference.kl_nats < (1e-9 if name == "int4_awq" else 1e-4)
    assert difference.kl_nats < 0.02 * source.metrics["kl_to_source_nats"]


@pytest.mark.parametrize("form", ["int8_smoothquant", {"kind": "int4_awq", "block_size": 64}])
def test_a_source_in_sixteen_bits_with_biases_keeps_its_logits(
    make_student, blocks, tmp_path, form
):
    """Scales and smoothed weights lie in bfloat16 there, head and embedding apart."""
    sizes = {"attention_bias": True, "tie_word_embeddings": False, "num_hidden_layers": 2}
    plain = make_student(noise=0.05, dtype=torch.bfloat16, **sizes)
    source, out = calibrated(plain, form, blocks, tmp_path / "q"), tmp_path / "e"
    out.mkdir()
    Onnx().export(source, out)
    difference = verify(Onnx(), source, out, blocks, source_logits(source, blocks))
    assert difference.kl_nats < 1e-6


@pytest.mark.parametrize("name", LOW_BIT_TYPES)
def test_every_projection_is_low_bit_and_the_rest_is_not(exported, name):
    source, out, metrics = exported(name)
    shape = read_shape(source.path)
    table = shape.vocab * shape.hidden
    low = sum(
        weight.numel()
        for key, weight in load_file(source.path / "model.safetensors").items()
        if key.endswith("_proj.weight")
    )
    assert weights_by_bits(out / "model.onnx") == {BITS[name]: low, 32: table}
    assert metrics["realised_low_bit_share"] == pytest.approx(low / (low + table))
    assert metrics["opset"] == (21 if name == "int4_awq" else 20)
    plain = exported("none")[1]
    saved = low * (4 - BITS[name] / 8)
    sizes = [(folder / "model.onnx.data").stat().st_size for folder in (plain, out)]
    assert sizes[0] - sizes[1] == pytest.approx(saved, rel=0.15)


@pytest.mark.parametrize("name", LOW_BIT_TYPES)
def test_inputs_outputs_and_cache_are_those_of_the_plain_graph(exported, name):
    plain, low = graph_of(exported("none")[1]), graph_of(exported(name)[1])
    assert list(plain.input) == list(low.input)
    assert list(plain.output) == list(low.output)
    nodes = {node.op_type for node in low.node} - {node.op_type for node in plain.node}
    rounded = {"QuantizeLinear"} if name != "int4_awq" else set()
    assert nodes == {"DequantizeLinear"} | rounded
    assert {node.domain for node in low.node} == {""}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8_smoothquant", "int4_awq"])
def test_the_cache_carries_the_greedy_tokens_of_the_quantized_model(exported, name):
    source, out, _ = exported(name)
    prompts = [[5, 9, 200, 33, 71], [300, 41, 8, 90, 2]]
    with OnnxRuntime(threads=1).load(out) as session:
        found = session.generate(prompts, 12)
    model, tokens = load_quantized(source.path, dtype="float32"), torch.tensor(prompts)
    with torch.inference_mode():
        for _ in range(12):
            best = model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, best], 1)
    np.testing.assert_array_equal(found, tokens[:, 5:].numpy())


@pytest.mark.parametrize(("name", "largest"), [("int8", 127), ("int4_awq", 7)])
def test_a_code_times_its_scale_is_the_weight_rounded_by_hand(exported, name, largest):
    """The reference reads the bytes of the data file itself, in float64."""
    source, out, _ = exported(name)
    stored = {t.name: t for t in graph_of(out).initializer}
    place = {e.key: e.value for e in stored[f"{PROJ}.weight.codes"].external_data}
    with (out / "model.onnx.data").open("rb") as file:
        file.seek(int(place["offset"]))
        data = np.frombuffer(file.read(int(place["length"])), np.uint8).astype(int)
    if name == "int4_awq":
        data = np.stack([data % 16, data // 16], 1).reshape(-1)
    codes_IO = np.where(data > largest, data - 2 * (largest + 1), data).reshape(128, 64)
    kept = load_file(source.path / QUANTIZERS)
    plain = load_file(source.path / "model.safetensors")
    true_IO = kept.get(f"{PROJ}.weight", plain[f"{PROJ}.weight"]).double().numpy().T
    groups = true_IO.reshape(2, 64, 64) if name == "int4_awq" else true_IO[None]
    step = np.abs(groups).max(1, keepdims=True) / largest
    np.testing.assert_array_equal(codes_IO, np.round(groups / step).reshape(128, 64))


def test_projections_of_one_input_share_its_codes(exported):
    """Four roundings a layer: before attention, before its output, and twice in the MLP."""
    nodes = [node.op_type for node in graph_of(exported("int8")[1]).node]
    assert nodes.count("QuantizeLinear") == 2 * 4
    assert nodes.count("DequantizeLinear") == 2 * (4 + 7)


def test_a_step_reads_as_many_bytes_as_its_weights_have(exported):
    plain, int8, int4, fp8 = (
        OnnxRuntime().decode_work(exported(name)[1]) for name in ("none", "int8", "int4_awq", "fp8")
    )
    assert plain.weight_bytes == 4 * plain.weights == fp8.weight_bytes
    low = weights_by_bits(exported("int8")[1] / "model.onnx")[8]
    assert plain.weight_bytes - int8.weight_bytes == 3 * low
    assert plain.weight_bytes - int4.weight_bytes == 3.5 * low


# --- planted faults -----------------------------------------------------------------------------


def moved(ending: str, factor: float = 1.01):
    """One number of one tensor, moved by a hundredth."""

    def change(graph) -> None:
        tensor = next(t for t in graph.initializer if t.name.endswith(ending))
        old = np.array(onnx.numpy_helper.to_array(tensor, base_dir=change.folder))
        old.reshape(-1)[old.size // 2] *= factor
        tensor.CopyFrom(onnx.numpy_helper.from_array(old, tensor.name))

    def spoil(out: Path) -> None:
        change.folder = str(out)
        in_graph(change)(out)

    return spoil


def one_code(out: Path) -> None:
    """The lowest bit of one code."""
    tensor = next(t for t in graph_of(out).initializer if t.name == f"{PROJ}.weight.codes")
    place = {e.key: e.value for e in tensor.external_data}
    with (out / "model.onnx.data").open("r+b") as file:
        file.seek(int(place["offset"]) + 77)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def without_rounding(graph) -> None:
    """The product reads what was there before it was quantized."""
    made_by = {name: node for node in graph.node for name in node.output}
    weight = next(n for n in graph.node if f"{PROJ}.weight.codes" in n.input).output[0]
    product = next(n for n in graph.node if weight in n.input)
    back = made_by[product.input[0]]
    product.input[0] = made_by[back.input[0]].input[0]


def other_axis(graph) -> None:
    """A square matrix, dequantized along its inputs."""
    node = next(n for n in graph.node if f"{QUERY}.weight.codes" in n.input)
    node.attribute[0].i = 0


def unsigned(graph) -> None:
    """Codes read as numbers without a sign."""
    tensor = next(t for t in graph.initializer if t.name == f"{PROJ}.weight.codes")
    tensor.data_type = onnx.TensorProto.UINT8


def swapped_scales(graph) -> None:
    """Query and key read each other's scales."""
    nodes = [
        next(
            n for n in graph.node if f"model.layers.1.self_attn.{part}_proj.weight.codes" in n.input
        )
        for part in "kv"
    ]
    nodes[0].input[1], nodes[1].input[1] = nodes[1].input[1], nodes[0].input[1]


FAULTS = {
    "scale of one channel": ("int8", moved(f"{PROJ}.weight.scale")),
    "scale of one matrix": ("fp8", moved(f"{PROJ}.weight.scale")),
    "scale of one block": ("int4_awq", moved(f"{PROJ}.weight.scale")),
    "scale of an input": ("int8", moved(f"{PROJ}.input_scale")),
    "scale of an FP8 input": ("fp8", moved(f"{PROJ}.input_scale")),
    "smoothing of one channel": ("int8_smoothquant", moved(f"{QUERY}.smoothing")),
    "smoothing of one channel, INT4": ("int4_awq", moved(f"{PROJ}.smoothing")),
    "one INT8 code": ("int8", one_code),
    "one FP8 code": ("fp8", one_code),
    "one INT4 code": ("int4_awq", one_code),
    "input not rounded": ("int8", in_graph(without_rounding)),
    "another axis": ("int8", in_graph(other_axis)),
    "unsigned codes": ("int8", in_graph(unsigned)),
    "scales swapped": ("int8", in_graph(swapped_scales)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen_in_the_files_alone(exported, tmp_path, fault):
    name, spoil = FAULTS[fault]
    source, good, _ = exported(name)
    assert Onnx().problems(source, good) == []
    shutil.copytree(good, tmp_path / "spoilt")
    spoil(tmp_path / "spoilt")
    assert Onnx().problems(source, tmp_path / "spoilt")


def test_a_plain_graph_is_no_export_of_a_quantized_source(exported, blocks):
    _, out, _ = exported("none")
    source, _, _ = exported("int8")
    with pytest.raises(VerificationError, match="low-bit in only one of source and graph"):
        verify(Onnx(), source, out, blocks, source_logits(source, blocks))


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("mixed", "format mixed is not written by onnx; those that are: fp8, int8, int8_smoothq"),
        ("nvfp4", "format nvfp4 is not written"),
        ({"kind": "recipe", "name": "fp8_default-kv_fp8"}, "format recipe is not written"),
        ({"kind": "fp8", "kv_cache": "fp8"}, "keeps its cache in fp32, not in fp8: quantize with"),
    ],
)
def test_a_format_that_a_graph_cannot_hold_is_refused_by_the_plan(teacher, settings, reason):
    (problem,) = Onnx().check_format(read_shape(teacher.path), build_plugin(FORMATS, settings))
    assert reason in problem


def test_a_source_in_such_a_format_is_refused_before_anything_is_written(quantized, tmp_path):
    source = quantized("mixed")
    assert Onnx().check_source(source)
    with pytest.raises(ModelError, match="format mixed is not written by onnx"):
        Onnx().export(source, tmp_path)
    assert not list(tmp_path.iterdir())


def test_half_precision_and_engines_take_plain_sources_only(teacher):
    shape = read_shape(teacher.path)
    assert Onnx().check(shape, "quantized") == []
    (problem,) = Onnx(precision="fp16").check(shape, "quantized")
    assert problem.endswith("set precision=fp32")
    (problem,) = EXPORTERS.load("tensorrt-rtx")().check(shape, "quantized")
    assert "plain checkpoint" in problem


def test_a_damaged_graph_is_one_error(exported, tmp_path):
    shutil.copytree(exported("none")[1], tmp_path / "e")
    (tmp_path / "e" / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(ModelError, match="cannot be loaded by ONNX Runtime"):
        OnnxRuntime().load(tmp_path / "e")
