"""Serving engines in process, against fakes of their documented interfaces."""

import pytest

from trt_kd.backends import BACKENDS
from trt_kd.errors import MissingDependencyError, ModelError

ENGINES = ("trtllm", "vllm")
PROMPTS = [[number, 5, 6, 7] for number in range(1, 5)]


@pytest.fixture(params=ENGINES)
def engine(request):
    return request.param


@pytest.fixture
def load(engine, fake_engines, teacher):
    opened = []

    def make(**options):
        opened.append(BACKENDS.load(engine)(**options).load(teacher.path))
        return opened[-1]

    yield make
    for session in opened:
        session.close()


@pytest.mark.parametrize("new_tokens", [1, 2, 9])
def test_every_step_ends_when_every_request_has_its_next_token(load, new_tokens):
    session = load()
    counts = {}
    real = session.stream

    async def stream(prompt, wanted):
        async for count in real(prompt, wanted):
            counts[prompt[0]] = count
            yield count

    session.stream = stream
    seen = [min(counts.values()) for _ in session.steps(PROMPTS, new_tokens)]
    assert len(seen) == new_tokens
    assert all(least >= step for step, least in enumerate(seen, start=1))
    assert set(counts.values()) == {new_tokens}


def test_a_batch_is_that_many_requests_in_flight_with_their_own_prompts(load):
    session = load()
    list(session.steps(PROMPTS, 5))
    list(session.steps(PROMPTS[:2], 5))
    sent = session._engine.requests
    assert session._engine.most_in_flight == len(PROMPTS)
    assert [ids for _, ids, _ in sent] == PROMPTS + PROMPTS[:2]
    assert len({number for number, _, _ in sent}) == len(sent)


def test_end_of_text_is_ignored_and_decoding_is_greedy(load, engine):
    session = load()
    assert len(list(session.steps(PROMPTS, 8))) == 8
    sampling = session._engine.requests[0][2]
    assert sampling.ignore_eos
    assert sampling.max_tokens == 8
    assert not sampling.detokenize
    assert sampling.top_k == 1 if engine == "trtllm" else sampling.temperature == 0.0


def test_the_prefix_cache_is_off_and_options_reach_the_engine(load, engine, teacher):
    args = load(tensor_parallel=2, memory_share=0.3, context_tokens=64)._engine.args
    assert args.model == str(teacher.path)
    assert args.dtype == "bfloat16"
    assert args.tensor_parallel_size == 2
    if engine == "vllm":
        assert args.enable_prefix_caching is False
        assert (args.gpu_memory_utilization, args.max_model_len) == (0.3, 64)
    else:
        assert args.kv_cache_config.enable_block_reuse is False
        assert (args.kv_cache_config.free_gpu_memory_fraction, args.max_seq_len) == (0.3, 64)


def test_too_few_tokens_are_an_error_and_the_session_goes_on(load):
    session = load(context_tokens=10)
    with pytest.raises(ModelError, match="answered with 6 tokens instead of 9"):
        list(session.steps(PROMPTS, 9))
    assert len(list(session.steps(PROMPTS, 6))) == 6


def test_leaving_in_the_middle_leaves_nothing_running(load):
    session = load()
    steps = session.steps(PROMPTS, 9)
    next(steps)
    steps.close()
    assert len(list(session.steps(PROMPTS, 3))) == 3


def test_closing_ends_the_engine_once(load):
    session = load()
    list(session.steps(PROMPTS, 2))
    running = session._engine
    session.close()
    session.close()
    assert running.down
    with pytest.raises(ValueError, match="closed"):
        list(session.steps(PROMPTS, 2))


def test_an_engine_gives_no_logits_and_says_what_does(load):
    with pytest.raises(ModelError, match=r"streams tokens and gives no logits\n  hint: evaluate"):
        load().logits(None)


def test_a_missing_engine_says_where_to_run(engine, teacher):
    name = {"trtllm": "tensorrt_llm"}.get(engine, engine)
    with pytest.raises(MissingDependencyError, match=f"{name} is not installed\n  hint: run this"):
        BACKENDS.load(engine)().load(teacher.path)


def test_threads_have_no_effect_and_are_refused(engine):
    with pytest.raises(ValueError, match="threads: no effect"):
        BACKENDS.load(engine)(threads=2)
