"""Tiny exports for the runtimes that are installed; programs that stand in for tools."""

import importlib.util
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trt_kd.exporters.onnx import Onnx
from trt_kd.exporters.ort_genai import OrtGenai
from trt_kd.exporters.trtllm_checkpoint import TrtllmCheckpoint

ENGINES = ("tensorrt_llm", "vllm")
"""Packages that ``fake_engines`` stands in for."""

FIXTURES = {
    "ort-genai": "ort_export",
    "onnxruntime": "onnx_export",
    "trtllm-checkpoint": "trtllm_checkpoint",
}
"""Which fixture makes a backend's export; the others load a stock checkpoint."""


@pytest.fixture(scope="session")
def ort_export(teacher, forks, tmp_path_factory) -> Path:
    """The tiny teacher as an fp32 export of ONNX Runtime GenAI's own builder."""
    pytest.importorskip("onnxruntime_genai")
    out = tmp_path_factory.mktemp("exports") / "ort"
    out.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trt_kd.exporters.ort_genai.subprocess", forks)
        OrtGenai(precision="fp32").export(teacher, out)
    return out


@pytest.fixture(scope="session")
def onnx_export(teacher, tmp_path_factory) -> Path:
    """The tiny teacher as a float32 ONNX step."""
    pytest.importorskip("onnxruntime")
    out = tmp_path_factory.mktemp("exports") / "onnx"
    out.mkdir()
    Onnx().export(teacher, out)
    return out


@pytest.fixture(scope="session")
def trtllm_checkpoint(teacher, tmp_path_factory) -> Path:
    """The tiny teacher as a TensorRT-LLM checkpoint of four ranks."""
    out = tmp_path_factory.mktemp("exports") / "trtllm"
    out.mkdir()
    TrtllmCheckpoint(tensor_parallel=2, pipeline_parallel=2).export(teacher, out)
    return out


@pytest.fixture(scope="session")
def directory_for(request, teacher) -> Callable[[str], Path]:
    """Return the directory that holds the tiny teacher in the form the named backend loads."""

    def find(backend: str) -> Path:
        made = FIXTURES.get(backend)
        return request.getfixturevalue(made) if made else teacher.path

    return find


@pytest.fixture(scope="session")
def tiny_server(teacher):
    """A server of the tiny teacher for the whole session; see ``server``."""
    spec = importlib.util.spec_from_file_location("serving", Path(__file__).with_name("serving.py"))
    serving = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serving)
    with serving.TinyServer(teacher.path) as running:
        yield running


@pytest.fixture
def server(tiny_server):
    """That server, as if just started."""
    tiny_server.state, tiny_server.stops_after = 200, None
    tiny_server.bodies.clear()
    return tiny_server


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Make a Python program the first of its name on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def make(name: str, code: str) -> None:
        path = folder / name
        path.write_text(f"#!{sys.executable}\n{code}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return make


@pytest.fixture
def fake_engines(monkeypatch):
    """Put fakes of serving engines on the path, for this process and those it starts."""
    monkeypatch.syspath_prepend(str(Path(__file__).with_name("engines")))
    yield
    for name in [each for each in sys.modules if each.partition(".")[0] in ENGINES]:
        del sys.modules[name]
