"""Tiny exports for the runtimes that are installed."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ort_export(teacher, tmp_path_factory) -> Path:
    """The tiny teacher as an fp32 export of ONNX Runtime GenAI's own builder."""
    pytest.importorskip("onnxruntime_genai")
    out = tmp_path_factory.mktemp("exports") / "ort"
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    options = ["-i", str(teacher.path), "-o", str(out), "-p", "fp32", "-e", "cpu"]
    subprocess.run([*builder, *options], check=True, capture_output=True, timeout=300)
    return out


@pytest.fixture(scope="session")
def directories(teacher, ort_export) -> dict[str, Path]:
    """One directory per backend that holds the tiny teacher in a form it loads."""
    return {
        "transformers": teacher.path,
        "ort-genai": ort_export,
        "hf-unified": teacher.path,
    }
