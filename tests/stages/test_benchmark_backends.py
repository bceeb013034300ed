"""Runtimes that a benchmark names by variant, and the time that they take to compile."""

import json
from pathlib import Path

import pytest

from trt_kd.config import validate
from trt_kd.errors import ArtifactError, ConfigError, MissingDependencyError
from trt_kd.stages.benchmark import BenchmarkConfig, benchmark

ENGINES = Path(__file__).parents[1] / "backends" / "engines"
COMPILER = '''
"""A backend that compiles for every shape, once each."""
import time
from typing import Literal

from trt_kd.backends.base import Backend, Session


class Compiler(Backend):
    """Sleeps to compile, and decodes only what it was compiled for."""

    kind: Literal["compiler_backend:Compiler"] = "compiler_backend:Compiler"
    breaks: bool = False

    def load(self, directory):
        return CompilerSession(self.breaks)


class CompilerSession(Session):
    vocab_size = 512
    compiles = True

    def __init__(self, breaks):
        self.breaks = breaks
        self.made = None

    def compile(self, prompts, new_tokens):
        if self.breaks and len(prompts) == 2:
            raise RuntimeError("graph break at two")
        time.sleep(0.2)
        self.made = (len(prompts), len(prompts[0]), new_tokens)

    def logits(self, tokens_BL):
        raise ValueError

    def steps(self, prompts, new_tokens):
        if self.made != (len(prompts), len(prompts[0]), new_tokens):
            raise RuntimeError("not compiled for this")
        for _ in range(new_tokens):
            time.sleep(0.001)
            yield

    def close(self):
        pass
'''


@pytest.fixture
def settings(text_file):
    return {
        "data": {"source": {"kind": "text", "files": [str(text_file)]}, "block_tokens": 32},
        "batch_sizes": [1, 2],
        "input_tokens": 8,
        "output_tokens": 3,
        "warmup": 1,
        "repeats": 2,
    }


@pytest.fixture
def compiler(tmp_path, monkeypatch, forked):
    (tmp_path / "compiler_backend.py").write_text(COMPILER)
    monkeypatch.syspath_prepend(str(tmp_path))
    return {"kind": "compiler_backend:Compiler"}


def run(settings, out, **variants):
    config = validate(BenchmarkConfig, settings, where="benchmark")
    made = benchmark(config, out=out, **variants)
    return json.loads((made.path / "benchmark.json").read_text())["variants"]


def test_compiling_is_timed_apart_from_warm_up_and_load(settings, compiler, teacher, tmp_path):
    found = run(settings | {"backends": {"b": compiler}}, tmp_path / "out", b=teacher)["b"]
    for record in found:
        assert 0.2 <= record["compile_s"] < 5
        assert record["e2e_ms"]["p99"] < 150
        assert record["backend"] == "compiler_backend:Compiler"


def test_what_cannot_be_compiled_is_a_record_and_the_rest_is_measured(
    settings, compiler, teacher, tmp_path
):
    chosen = {"backends": {"b": compiler | {"breaks": True}}}
    first, second = run(settings | chosen, tmp_path / "out", b=teacher)["b"]
    assert "compile_s" in first
    assert "graph break at two" in second["error"]


@pytest.mark.usefixtures("forked")
def test_an_engine_in_process_is_measured_by_our_clock(settings, teacher, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ENGINES))
    chosen = {"backends": {"served": {"kind": "vllm"}}}
    found = run(settings | chosen, tmp_path / "out", served=teacher)["served"]
    assert [record["backend"] for record in found] == ["vllm", "vllm"]
    assert all(record["itl_ms"]["p50"] > 0 for record in found)
    assert all("compile_s" not in record for record in found)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"backends": {"other": "vllm"}}, ConfigError, "no variant 'other'\n  hint: available: a"),
        ({"backends": {"a": "ort-genai"}}, ArtifactError, "ort-genai does not load a checkpoint"),
        ({"backends": {"a": "vllm"}}, MissingDependencyError, "vllm is not installed"),
        ({"backends": {"a": "trtllm"}}, MissingDependencyError, "tensorrt_llm is not installed"),
        (
            {"backends": {"a": {"kind": "transformers", "threads": 1}}, "threads": 2},
            ConfigError,
            "no effect beside threads",
        ),
        ({"backends": {"a": {"kind": "vllm", "threads": 1}}}, ConfigError, "threads: no effect"),
        (
            {"backends": {"a": "vllm"}, "load_generator": "trtllm-bench"},
            ConfigError,
            "no effect beside load_generator",
        ),
    ],
)
def test_a_runtime_that_does_not_fit_is_refused_before_anything_is_loaded(
    settings, teacher, tmp_path, change, error, says
):
    if "load_generator" in change:
        settings = {name: settings[name] for name in settings if name != "warmup"}
    with pytest.raises(error, match=says):
        run(settings | change, tmp_path / "out", a=teacher)
    assert not (tmp_path / "out").exists()
