"""TensorRT for RTX: options, profiles, what the compiler wrote, and planted faults."""

import json
import logging
import shutil
import sys
from types import SimpleNamespace

import pytest

from trt_kd.architectures.shape import read_shape
from trt_kd.config import validate
from trt_kd.errors import ConfigError, MissingDependencyError, ModelError, VerificationError
from trt_kd.exporters.tensorrt_rtx import TensorrtRtx
from trt_kd.exporters.tensorrt_rtx_build import MAGIC, engine_problems
from trt_kd.exporters.verification import source_logits, verify
from trt_kd.stages.export import weight_bytes

SMALL = {
    "compute_capabilities": ["8.9"],
    "max_batch": 8,
    "optimal_batch": 2,
    "input_tokens": 64,
    "max_tokens": 128,
}


@pytest.fixture(scope="session")
def lane() -> TensorrtRtx:
    return TensorrtRtx.model_validate(SMALL)


@pytest.fixture(scope="session")
def exported(teacher, lane, tmp_path_factory):
    """The tiny teacher's engine and the metrics of its export."""
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path_factory.mktemp("rtx") / "e"
    out.mkdir()
    return out, lane.export(teacher, out)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optimal_batch": 9}, "optimal_batch 9 exceeds max_batch"),
        ({"input_tokens": 128}, "leave no room below max_tokens"),
        ({"compute_capabilities": []}, "compute_capabilities"),
        ({"compute_capabilities": ["8.9", "8.9"]}, "name one twice"),
        ({"compute_capabilities": ["9.0"]}, "8.9"),
    ],
)
def test_sizes_and_targets_that_make_no_engine_are_refused(changes, says):
    with pytest.raises(ConfigError, match=says):
        validate(TensorrtRtx, SMALL | changes, where="lane")


def test_every_profile_covers_one_sequence_and_the_largest_batch_at_the_longest_text(lane):
    for sizes in lane.profiles().values():
        least, best, largest = sizes
        assert least == (1, 1, 0)
        assert largest[0] == 8
        assert largest[1] + largest[2] == 128
        assert all(a <= b <= c for a, b, c in zip(least, best, largest, strict=True))
    assert {new for _, new, _ in lane.profiles()["step"]} == {1}


def test_what_no_graph_can_be_made_of_is_refused(teacher, lane):
    shape = read_shape(teacher.path)
    assert lane.check(shape, "checkpoint") == []
    (problem,) = lane.check(shape, "quantized")
    assert problem.startswith("tensorrt-rtx takes a plain checkpoint")


def test_a_missing_package_names_its_extra(teacher, lane, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingDependencyError, match=r"trt-kd\[tensorrt-rtx\]"):
        lane.export(teacher, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_texts_beyond_the_context_are_refused_before_the_model_is_loaded(
    teacher, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace())
    with pytest.raises(ModelError, match="2048 exceed the model's context of 512"):
        TensorrtRtx().export(teacher, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_rehearsal_compiles_for_one_gpu():
    assert len(TensorrtRtx().rehearsal().compute_capabilities) == 1


@pytest.mark.slow
def test_an_engine_says_what_it_was_built_for_and_that_it_did_not_run(exported, teacher, lane):
    out, metrics = exported
    described = json.loads((out / "engine.json").read_text())
    assert described["compute_capabilities"] == ["8.9"]
    assert described["tensors"]["past_key_values.3.value"] == {
        "dtype": "float16",
        "shape": [-1, 2, -1, 16],
    }
    assert described["profiles"]["step"]["attention_mask"] == [[1, 1], [2, 64], [8, 128]]
    assert described["profiles"]["prompt"]["input_ids"] == [[1, 1], [2, 64], [8, 64]]
    assert metrics["engine_executed"] is False
    # One product, the rotation's angles, stays in float32; head and layers do not.
    assert metrics["matrix_products_by_precision"] == {"float16": 4 * 9 + 1, "float32": 1}
    assert metrics["engine_bytes"] == weight_bytes(out) == (out / "model.engine").stat().st_size
    assert metrics["weight_share_by_bits"] == {"16": 1.0}


@pytest.mark.slow
def test_the_graph_below_the_engine_agrees_with_the_source(exported, teacher, lane, blocks):
    difference = verify(lane, teacher, exported[0], blocks, source_logits(teacher, blocks))
    assert 0 < difference.kl_nats < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["truncated", "not an engine", "absent", "tensors", "graph"])
def test_a_planted_fault_is_seen(exported, teacher, lane, blocks, tmp_path, fault):
    out = tmp_path / "spoilt"
    shutil.copytree(exported[0], out)
    engine = out / "model.engine"
    if fault == "truncated":
        engine.write_bytes(engine.read_bytes()[:-16])
    elif fault == "not an engine":
        engine.write_bytes(b"0" + engine.read_bytes()[1:])
    elif fault == "absent":
        engine.unlink()
    elif fault == "tensors":
        text = (out / "engine.json").read_text()
        (out / "engine.json").write_text(text.replace('"float16"', '"float32"', 1))
    else:
        (out / "model.onnx.data").write_bytes(b"\0" * (out / "model.onnx.data").stat().st_size)
    with pytest.raises(VerificationError):
        verify(lane, teacher, out, blocks, source_logits(teacher, blocks))


def test_an_engine_without_its_weights_is_seen(tmp_path):
    header = MAGIC + bytes(12) + (64).to_bytes(8, "little")
    (tmp_path / "model.engine").write_bytes(header + bytes(64 - len(header)))
    (tmp_path / "model.onnx.data").write_bytes(bytes(1000))
    (tmp_path / "engine.json").write_text("{}")
    pytest.importorskip("onnx").save(onnx_model(), str(tmp_path / "model.onnx"))
    found = engine_problems(tmp_path)
    assert found[0] == "model.engine has 64 bytes, too few for 1,000 bytes of weights"
    assert "engine.json cannot be read" in found[1]


def onnx_model():
    import onnx

    return onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))


@pytest.mark.slow
def test_a_graph_that_the_compiler_cannot_read_is_one_error(exported, lane, tmp_path, caplog):
    from trt_kd.exporters.tensorrt_rtx_build import build

    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with caplog.at_level(logging.ERROR), pytest.raises(ModelError, match="cannot read the graph"):
        build(lane, tmp_path)
    assert not (tmp_path / "model.engine").exists()


def test_where_an_engine_opens_its_layers_are_counted():
    from trt_kd.exporters.tensorrt_rtx_build import _inspected

    text = json.dumps({"Layers": ["a", "b", "c"]})
    inspector = SimpleNamespace(get_engine_information=lambda form: text)
    engine = SimpleNamespace(
        create_engine_inspector=lambda: inspector, num_io_tensors=5, num_optimization_profiles=2
    )
    library = SimpleNamespace(
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda plan: engine),
        LayerInformationFormat=SimpleNamespace(JSON=1),
    )
    assert _inspected(library, None, b"") == {
        "engine_inspected": True,
        "engine_layers": 3,
        "engine_tensors": 5,
        "engine_profiles": 2,
    }
