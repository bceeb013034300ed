"""What every exporter obeys. A new one is tested here without a new test."""

import subprocess
import sys

import pytest

from trt_kd.architectures.shape import read_shape
from trt_kd.artifacts import Artifact, writing
from trt_kd.backends import BACKENDS
from trt_kd.backends.base import backend_for
from trt_kd.config import StageConfig, build_plugin
from trt_kd.errors import ArtifactError
from trt_kd.exporters import EXPORTERS


@pytest.fixture(params=EXPORTERS.names())
def lane(request):
    return build_plugin(EXPORTERS, request.param)


def test_an_exporter_is_named_as_registered(lane):
    assert EXPORTERS.load(lane.kind) is type(lane)


def test_an_exporter_survives_its_own_settings(lane):
    assert build_plugin(EXPORTERS, lane.model_dump()) == lane


class Made(StageConfig):
    stage = "export"
    lane: object = None


def test_an_export_is_run_by_what_read_it_back_or_by_nothing(lane, tmp_path):
    assert lane.backend in BACKENDS.names()
    with writing(tmp_path / "e", kind="export", config=Made(lane=lane), inputs={}):
        pass
    export = Artifact.open(tmp_path / "e")
    if lane.executed:
        assert backend_for(export).kind == lane.backend
    else:
        with pytest.raises(ArtifactError, match="no backend runs the lane"):
            backend_for(export)


def test_a_plain_llama_can_be_exported(lane, teacher):
    assert lane.check(read_shape(teacher.path), "checkpoint") == []


def test_what_is_no_model_cannot_be_exported(lane, teacher):
    assert lane.check(read_shape(teacher.path), "evaluation")


def test_a_limit_is_a_positive_number(lane, teacher):
    assert 0 < lane.kl_limit_nats(teacher) < 1


def test_checks_need_no_torch():
    code = (
        "import sys; from trt_kd.exporters import EXPORTERS\n"
        "from trt_kd.architectures.shape import ModelShape\n"
        "shape = ModelShape('llama', 1, 64, 64, 1, 1, 64, 64, tied=True)\n"
        "[EXPORTERS.load(n)().check(shape, 'checkpoint') for n in EXPORTERS.names()]\n"
        "sys.exit(bool({'torch', 'onnx', 'modelopt', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
