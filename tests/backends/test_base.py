"""Which backend runs which artifact, and what a decoding step must read."""

import sys

import pytest

from trt_kd.architectures.shape import read_shape
from trt_kd.artifacts import Artifact, writing
from trt_kd.backends import BACKENDS
from trt_kd.backends.base import backend_for
from trt_kd.config import StageConfig
from trt_kd.errors import ArtifactError, ConfigError, MissingDependencyError, ModelError


class MadeConfig(StageConfig):
    stage = "export"
    lane: object = None


def made(out, kind, lane=None):
    with writing(out, kind=kind, config=MadeConfig(lane=lane), inputs={}):
        pass
    return Artifact.open(out)


def test_checkpoints_run_in_transformers(teacher):
    assert backend_for(teacher).kind == "transformers"


@pytest.mark.parametrize("lane", ["ort-genai", {"kind": "ort-genai", "precision": "int4"}])
def test_exports_run_in_their_lane(tmp_path, lane):
    assert backend_for(made(tmp_path / "a", "export", lane)).kind == "ort-genai"


@pytest.mark.parametrize(
    ("kind", "lane", "says"),
    [
        ("export", {"kind": "trtllm-engine"}, "no backend runs the lane 'trtllm-engine'"),
        ("export", None, "does not say its lane"),
        ("evaluation", None, "is of kind evaluation"),
    ],
)
def test_what_no_backend_runs_is_said(tmp_path, kind, lane, says):
    with pytest.raises(ArtifactError, match=says):
        backend_for(made(tmp_path / "a", kind, lane))


def test_a_users_own_backend_is_taken_by_its_target(tmp_path):
    with pytest.raises(ConfigError, match="cannot be imported"):
        backend_for(made(tmp_path / "a", "export", {"kind": "no_such_package:Backend"}))


def test_a_missing_runtime_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'trt-kd\[onnx\]'"):
        BACKENDS.load("ort-genai")().load(tmp_path)


def test_a_damaged_export_is_named(ort_export, tmp_path):
    (tmp_path / "genai_config.json").write_text((ort_export / "genai_config.json").read_text())
    with pytest.raises(ModelError, match="cannot be loaded by ONNX Runtime GenAI"):
        BACKENDS.load("ort-genai")().load(tmp_path)


def test_a_workload_beyond_the_context_is_refused(ort_export):
    with (
        BACKENDS.load("ort-genai")().load(ort_export) as session,
        pytest.raises(ModelError, match="exceed the model's context of 512"),
    ):
        list(session.steps([[1] * 500], 40))


def test_ids_outside_the_vocabulary_are_refused(ort_export):
    with BACKENDS.load("ort-genai")().load(ort_export) as session:
        for ids in ([[-1, 2]], [[1, 512]]):
            with pytest.raises(ValueError, match="vocabulary 512"):
                list(session.steps(ids, 1))


def test_a_step_reads_the_same_weights_in_either_runtime(teacher, ort_export):
    shape = read_shape(teacher.path)
    norms = shape.parts()["norms"]
    ours = BACKENDS.load("transformers")(device="cpu").decode_work(teacher.path)
    theirs = BACKENDS.load("ort-genai")().decode_work(ort_export)
    assert ours.weights == shape.parameters == theirs.weights + norms
    assert ours.weight_bytes == 4 * ours.weights
    assert theirs.weight_bytes == 4 * theirs.weights
    assert ours.kv_bytes_per_token == theirs.kv_bytes_per_token == 4 * 2 * 4 * 2 * 16
