"""A teacher behind a server: the cache of a local one, resumed, verified, in two lines or less."""

import json
import socket

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from trt_kd.artifacts import Artifact, writing
from trt_kd.checkpoints import load_tokenizer, save_model
from trt_kd.config import StageConfig
from trt_kd.data.base import token_blocks
from trt_kd.errors import ConfigError, ServerError, TrtKdError
from trt_kd.stages.distill import DistillConfig, distill
from trt_kd.teachers import writing as writing_module
from trt_kd.teachers.base import Demand
from trt_kd.teachers.cached import CachedTeacher
from trt_kd.teachers.endpoint import Endpoint
from trt_kd.teachers.served import ServedTeacher

K, COUNT = 16, 6


class MadeElsewhereConfig(StageConfig):
    """Stands for the stage that made a student."""

    stage = "prune"


@pytest.fixture(scope="module")
def settings(text_file):
    def make(teacher, **changes):
        source = {"kind": "text", "files": [str(text_file)]}
        plain = {
            "teacher": teacher,
            "data": {"source": source, "block_tokens": 24},
            "steps": 3,
            "batch_size": 2,
            "precision": "fp32",
        }
        return DistillConfig.model_validate(plain | changes)

    return make


@pytest.fixture(scope="module")
def blocks(settings, teacher):
    tokenizer = load_tokenizer(teacher.path)
    return np.array(token_blocks(settings("cached").data, tokenizer, split="train", count=COUNT))


@pytest.fixture(scope="module")
def local(teacher, blocks, tmp_path_factory):
    """The cache that the model itself fills."""
    work = tmp_path_factory.mktemp("local")
    return CachedTeacher(k=K, draws=0).targets(teacher.path, Demand(blocks, "fp32", work))


@pytest.fixture
def ask(server, teacher, blocks, tmp_path):
    """Fill a cache from the server; keyword arguments are options of the teacher."""

    def fill(work=tmp_path / "work", **options):
        plain = {"url": server.url, "model": "tiny", "k": K, "retries": 0}
        served = ServedTeacher.model_validate({"kind": "served"} | plain | options)
        return served.targets(teacher.path, Demand(blocks, "fp32", work))

    return fill


def two_lines(error):
    assert isinstance(error.value, TrtKdError)
    assert len(str(error.value).splitlines()) == 2
    return str(error.value)


def assert_same_rows(one, other):
    assert torch.equal(one.ids, other.ids)
    torch.testing.assert_close(one.logp, other.logp, atol=0.05, rtol=0)
    torch.testing.assert_close(one.tail, other.tail, atol=0.05, rtol=0)


# --- what it says -------------------------------------------------------------------------------


def test_the_cache_is_that_of_the_model_itself(ask, server, blocks, local):
    served = ask()
    assert_same_rows(served.rows(blocks), local.rows(blocks))
    assert [body["prompt_logprobs"] for body in server.bodies] == [K] * COUNT
    assert sorted(body["prompt"] for body in server.bodies) == sorted(blocks.tolist())


@pytest.mark.parametrize("spelling", ["token ids", "pieces"])
def test_an_echo_says_the_same(ask, server, blocks, local, spelling):
    pieces = server.tokenizer.convert_ids_to_tokens
    server.text_of = pieces if spelling == "pieces" else "token_id:{}".format
    assert_same_rows(ask(form="echo").rows(blocks), local.rows(blocks))
    assert server.bodies[0]["echo"] is True
    assert "prompt_logprobs" not in server.bodies[0]


def test_training_from_a_server_needs_no_checkpoint_and_names_no_host(
    settings, server, make_model, tokenizer_dir, tmp_path, monkeypatch
):
    monkeypatch.setenv("SERVER_KEY", "sesame-4711")
    with writing(
        tmp_path / "s", kind="checkpoint", config=MadeElsewhereConfig(), inputs={}
    ) as draft:
        save_model(make_model(seed=5), draft.path, tokenizer_from=tokenizer_dir)
    student = Artifact.open(tmp_path / "s")
    config = settings(
        {"kind": "served", "url": server.url, "model": "tiny", "k": K, "key_env": "SERVER_KEY"}
    )
    made = distill(config, student=student, out=tmp_path / "out")
    assert made.metrics["response_nats_per_token"] > 0
    manifest = (made.path / "trt_kd.json").read_text(encoding="utf-8")
    assert "tiny" in manifest
    for secret in ("sesame", "127.0.0.1", f":{server.server_port}"):
        assert secret not in manifest
    assert {seen["Authorization"] for seen in server.headers_seen} == {"Bearer sesame-4711"}
    assert "sesame" not in repr(config.teacher.endpoint())


def test_no_more_requests_than_allowed_are_at_work_at_a_time(ask, server):
    server.delay_s = 0.05
    ask(parallel=3)
    assert 1 < server.most_at_work <= 3


# --- how it survives ----------------------------------------------------------------------------


def test_a_run_that_the_server_left_goes_on_to_the_same_bytes(
    ask, server, blocks, tmp_path, monkeypatch
):
    monkeypatch.setattr(writing_module, "SHARD_TOKENS", 1)  # one batch of four blocks to a shard
    ask(tmp_path / "whole", parallel=1)
    server.bodies.clear()
    server.states[:] = [200] * 5 + [503] * 9
    with pytest.raises(ServerError, match="HTTP 503"):
        ask(tmp_path / "cut", parallel=1)
    assert len(list((tmp_path / "cut" / "logits").glob("shard-*"))) == 1
    server.states.clear()
    server.bodies.clear()
    ask(tmp_path / "cut", parallel=1)
    assert [body["prompt"] for body in server.bodies] == blocks[4:].tolist()
    whole, cut = ({p.name: p.read_bytes() for p in (tmp_path / name / "logits").glob("*.*")}
                  for name in ("whole", "cut"))  # fmt: skip
    assert whole == cut
    server.bodies.clear()
    ask(tmp_path / "cut", parallel=1)
    assert not server.bodies


def test_trouble_that_may_pass_is_waited_for_longer_and_longer(server, blocks):
    pauses = []
    server.states[:] = [503, 500, 429, 503]
    endpoint = Endpoint(server.url, "tiny", retries=4, sleep=pauses.append)
    endpoint.complete(prompt=blocks[0].tolist(), prompt_logprobs=2)
    assert pauses == [1, 2, 7, 8]
    assert len(server.bodies) == 5


def test_a_server_that_is_silent_is_given_up(server, blocks):
    server.delay_s = 0.5
    endpoint = Endpoint(server.url, "tiny", timeout_s=0.05, retries=1, sleep=lambda _: None)
    with pytest.raises(ServerError, match="no answer after 2 attempts: timed out") as error:
        endpoint.complete(prompt=blocks[0].tolist(), prompt_logprobs=2)
    two_lines(error)


# --- what it refuses ----------------------------------------------------------------------------


def test_a_server_that_is_down_is_named(ask):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ServerError, match=r"no answer after 1 attempts: .*refused") as error:
        ask(url=url)
    assert url in two_lines(error)


def test_a_wrong_model_name_lists_the_servers_models(ask):
    with pytest.raises(ServerError, match="'small': HTTP 404 The model `small`") as error:
        ask(model="small")
    assert "its models: tiny" in two_lines(error)


@pytest.mark.parametrize(("state", "what"), [(401, "key_env"), (403, "key_env"), (400, "log")])
def test_a_refusal_is_not_asked_again(server, blocks, state, what):
    server.states[:] = [state]
    with pytest.raises(ServerError, match=f"HTTP {state} told to say {state}") as error:
        Endpoint(server.url, "tiny", sleep=None).complete(prompt=blocks[0].tolist())
    assert what in two_lines(error)
    assert len(server.bodies) == 1


def test_a_key_is_never_carried_to_another_place(server, blocks):
    server.states[:] = [302]
    with pytest.raises(ServerError, match="HTTP 302"):
        Endpoint(server.url, "tiny", "secret").complete(prompt=blocks[0].tolist())
    assert len(server.bodies) == 1


def first_entry(change):
    def act(choice):
        entry = choice["prompt_logprobs"][1]
        change(entry, max(entry, key=lambda token: entry[token]["logprob"]))
        return choice

    return act


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda choice: {"text": "x"}, "no log-probabilities of the prompt"),
        (lambda choice: {"logprobs": {"tokens": ["x"]}}, "no log-probabilities of the prompt"),
        (lambda choice: {"prompt_logprobs": choice["prompt_logprobs"][:3]}, "no log-probabilities"),
        (first_entry(lambda entry, best: entry.clear()), "does not say how likely"),
        (first_entry(lambda entry, best: entry[best].update(logprob=float("nan"))), "log-prob"),
        (first_entry(lambda entry, best: entry[best].update(logprob=0.7)), "no log-probability"),
        (first_entry(lambda entry, best: entry.update({"600": entry.pop(best)})), "600 is outside"),
        (
            first_entry(lambda entry, best: [one.update(logprob=-0.1) for one in entry.values()]),
            "sum to",
        ),
        (
            first_entry(lambda entry, best: [entry.pop(key) for key in list(entry)[:3]]),
            r"of 16 log-probabilities|does not say how likely",
        ),
        (lambda choice: {"prompt_logprobs": [3] * 24}, "of no known form"),
    ],
)
def test_an_answer_that_cannot_be_used_says_why(ask, server, change, message):
    server.change = change
    with pytest.raises(ServerError, match=message) as error:
        ask()
    two_lines(error)


@pytest.mark.parametrize("form", ["prompt_logprobs", "echo"])
def test_another_tokenizer_is_found_by_what_tokens_read_as(ask, server, form):
    server.text_of = lambda token: server.tokenizer.decode([(token + 1) % 512])
    with pytest.raises(ServerError, match="another tokenizer") as error:
        ask(form=form)
    two_lines(error)


def test_ids_that_cannot_be_verified_are_refused(ask, server):
    server.text_of = lambda token: None
    with pytest.raises(ServerError, match="cannot be verified"):
        ask()


def test_texts_that_are_not_one_token_are_refused_with_the_remedy(ask):
    with pytest.raises(ServerError, match="not the text of one token: ask with form prompt"):
        ask(form="echo")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"url": "ftp://host/v1"}, "http://HOST"),
        ({"url": "file:///etc/passwd"}, "http://HOST"),
        ({"url": "http://me:secret@host/v1"}, "holds no key"),
        ({"url": "http://host/v1?key=secret"}, "holds no key"),
        ({"key_env": "sk-123"}, "pattern"),
        ({"k": 0}, "greater than 0"),
        ({"max_dropped_mass": 0.5}, "no effect"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, change, message):
    teacher = {"kind": "served", "url": "http://host/v1", "model": "m"} | change
    with pytest.raises(ValidationError, match=message):
        settings(teacher)


def test_a_variable_without_a_key_is_named(ask, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ConfigError, match="NO_SUCH_KEY is not set") as error:
        ask(key_env="NO_SUCH_KEY")
    two_lines(error)


def test_a_loss_that_needs_the_whole_distribution_is_refused(settings):
    teacher = {"kind": "served", "url": "http://host/v1", "model": "m"}
    with pytest.raises(ValidationError, match=r"teacher served: .* the teacher's whole distrib"):
        settings(teacher, loss={"kind": "forward_kl", "temperature": 2})


def test_a_checkpoint_beside_a_served_teacher_is_refused(settings, teacher, tmp_path):
    config = settings({"kind": "served", "url": "http://host/v1", "model": "m"})
    with pytest.raises(ConfigError, match="reads no checkpoint") as error:
        distill(config, student=teacher, teacher=teacher, out=tmp_path / "out")
    two_lines(error)


def test_how_the_server_is_reached_is_no_part_of_a_runs_identity(settings):
    here, there = (
        settings({"kind": "served", "model": "m"} | ways)
        for ways in (
            {"url": "http://here/v1"},
            {"url": "http://there/v1", "parallel": 9, "retries": 0, "key_env": "A", "timeout_s": 1},
        )
    )
    assert json.dumps(here.model_dump(mode="json")) == json.dumps(there.model_dump(mode="json"))
