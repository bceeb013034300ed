"""Tiny exports for the runtimes that are installed."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FIXTURES = {"ort-genai": "ort_export"}
"""Which fixture makes a backend's export; the others load a stock checkpoint."""


@pytest.fixture(scope="session")
def ort_export(teacher, tmp_path_factory) -> Path:
    """The tiny teacher as an fp32 export of ONNX Runtime GenAI's own builder."""
    pytest.importorskip("onnxruntime_genai")
    out = tmp_path_factory.mktemp("exports") / "ort"
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    options = ["-i", str(teacher.path), "-o", str(out), "-p", "fp32", "-e", "cpu"]
    done = subprocess.run(
        [*builder, *options], check=False, capture_output=True, text=True, timeout=300
    )
    if done.returncode and "from 'transformers'" in done.stderr:
        pytest.skip("this builder needs a newer transformers; the runtime itself does not")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def directory_for(request, teacher) -> Callable[[str], Path]:
    """Return the directory that holds the tiny teacher in the form the named backend loads."""

    def find(backend: str) -> Path:
        made = FIXTURES.get(backend)
        return request.getfixturevalue(made) if made else teacher.path

    return find
