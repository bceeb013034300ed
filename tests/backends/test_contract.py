"""Laws every registered backend obeys, with transformers as the reference."""

import numpy as np
import pytest

from trt_kd.backends import BACKENDS

LIMIT = {
    "transformers": 1e-6,
    "ort-genai": 1e-4,
    "onnxruntime": 1e-4,
    "hf-unified": 1e-5,
    "trtllm-checkpoint": 1e-5,
}
"""Largest difference of a float32 logit from transformers, by backend."""

TOKENS = np.random.default_rng(0).integers(1, 512, (3, 12))


WITH_LOGITS = [name for name in BACKENDS.names() if BACKENDS.load(name).gives_logits]
"""The others are engines that stream tokens: tests/backends/test_streaming.py."""


@pytest.fixture(params=WITH_LOGITS)
def session(request, directory_for):
    with BACKENDS.load(request.param)(threads=1).load(directory_for(request.param)) as session:
        yield session


@pytest.fixture(scope="module")
def reference(teacher):
    with BACKENDS.load("transformers")().load(teacher.path) as session:
        yield session


@pytest.fixture
def limit(request):
    return LIMIT[request.node.callspec.params["session"]]


@pytest.mark.parametrize("name", BACKENDS.names())
def test_the_registered_name_is_the_default_kind(name):
    backend = BACKENDS.load(name)
    assert backend.model_fields["kind"].default == name


def test_logits_are_float32_of_every_position(session):
    logits = session.logits(TOKENS)
    assert logits.dtype == np.float32
    assert logits.shape == (3, 12, session.vocab_size) == (3, 12, 512)


def test_logits_agree_with_transformers(session, reference, limit):
    np.testing.assert_allclose(session.logits(TOKENS), reference.logits(TOKENS), atol=limit)


@pytest.mark.parametrize("places", [[0, 1], [5], [11], [9, 10, 11]])
def test_end_of_text_inside_a_row_is_a_token_like_any_other(session, reference, limit, places):
    tokens = TOKENS.copy()
    tokens[1, places] = 0
    np.testing.assert_allclose(session.logits(tokens), reference.logits(tokens), atol=limit)


def test_calls_do_not_influence_each_other(session):
    first = session.logits(TOKENS[:2])
    list(session.steps(TOKENS.tolist(), 2))
    np.testing.assert_array_equal(session.logits(TOKENS[:2]), first)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("new_tokens", [1, 40])
def test_steps_come_exactly_as_often_as_asked(session, batch, new_tokens):
    assert len(list(session.steps(TOKENS[:batch].tolist(), new_tokens))) == new_tokens


def test_prompts_of_different_lengths_are_refused(session):
    with pytest.raises(ValueError, match="one length"):
        list(session.steps([[1, 2], [3]], 2))


def test_no_prompt_is_refused(session):
    with pytest.raises(ValueError, match="one length"):
        list(session.steps([], 2))


def test_a_closed_session_says_so(session):
    session.close()
    session.close()
    with pytest.raises(ValueError, match="closed"):
        session.logits(TOKENS)
