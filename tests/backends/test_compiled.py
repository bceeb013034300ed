"""Compiled decoding: the same tokens, one program for a workload, the time to make it apart."""

import os
import warnings
from shutil import which

import pytest

from trt_kd.backends import BACKENDS
from trt_kd.backends.compiled import CompiledSession, require_compiler
from trt_kd.backends.transformers import TransformersSession
from trt_kd.errors import MissingDependencyError

needs_compiler = pytest.mark.skipif(
    which(os.environ.get("CXX", "g++")) is None, reason="torch.compile has no C++ compiler here"
)
PROMPTS = [[5, 9, 2, 77, 31], [8, 8, 41, 3, 100]]


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(num_hidden_layers=2, hidden_size=32, intermediate_size=64)


@pytest.fixture(autouse=True)
def _quiet():
    """Torch's compiler warns of its own deprecated parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tokens(session, prompts, count):
    return [ids_B1.tolist() for ids_B1 in session.greedy(prompts, count)]


@needs_compiler
@pytest.mark.slow
def test_compiled_decoding_gives_eager_tokens_from_a_program_that_was_made_before(model):
    eager, compiled = TransformersSession(model), CompiledSession(model)
    compiled.compile(PROMPTS, 9)
    program = compiled._step
    for prompts in (PROMPTS, [row[::-1] for row in PROMPTS]):
        assert tokens(compiled, prompts, 9) == tokens(eager, prompts, 9)
    assert compiled._step is program
    compiled.close()
    with pytest.raises(ValueError, match="closed"):
        tokens(compiled, PROMPTS, 9)


def test_a_single_token_is_prefill_alone_and_compiles_nothing(model):
    session = CompiledSession(model)
    assert tokens(session, PROMPTS, 1) == tokens(TransformersSession(model), PROMPTS, 1)


def test_a_missing_compiler_is_named_before_the_model_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MissingDependencyError, match=r"no no-such-compiler\n  hint: install g"):
        require_compiler()
    with pytest.raises(MissingDependencyError, match="no-such-compiler"):
        BACKENDS.load("transformers")(compile=True).load(tmp_path)
