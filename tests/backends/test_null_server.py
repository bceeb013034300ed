"""The server without a model: exact lengths, many clients, and nothing that ends it."""

import http.client
import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from trt_kd.backends.null_server import TOKEN, NullServer


@pytest.fixture(scope="module")
def server():
    with NullServer("tiny") as running:
        yield running


def post(server, path, body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{server.url}/{path}", data=data)
    with urllib.request.urlopen(request, timeout=10) as answer:
        lines = answer.read().decode().split("\n\n")
    return [line.removeprefix("data: ") for line in lines if line]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("count", [1, 7, 300])
def test_an_answer_has_as_many_events_as_tokens_were_asked_for(server, path, field, count):
    *events, usage, done = post(server, path, {"model": "tiny", field: count})
    choices = [json.loads(event)["choices"][0] for event in events]
    texts = [choice.get("text", choice.get("delta", {}).get("content")) for choice in choices]
    assert texts == [TOKEN] * count + [""]
    assert choices[-1]["finish_reason"] == "length"
    assert json.loads(usage)["usage"]["completion_tokens"] == count
    assert done == "[DONE]"


def test_it_goes_by_the_name_it_was_given(server):
    with urllib.request.urlopen(f"{server.url}/models", timeout=10) as answer:
        assert [model["id"] for model in json.loads(answer.read())["data"]] == ["tiny"]


@pytest.mark.parametrize("body", [b"no json", {"model": "tiny"}, b"[1]", {"max_tokens": "many"}])
def test_a_request_without_a_length_is_refused_and_the_next_is_answered(server, body):
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(server, "completions", body)
    with caught.value as refused:
        assert refused.code == 400
    assert len(post(server, "completions", {"max_tokens": 2})) == 2 + 3


def test_many_clients_are_answered_at_once_on_connections_that_stay_open(server):
    before = server.answered

    def ask(_):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        lengths = []
        for _ in range(3):
            connection.request("POST", "/v1/completions", json.dumps({"max_tokens": 20}))
            lengths.append(connection.getresponse().read().count(b"data: "))
        connection.close()
        return lengths

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(16))) == [[23] * 3] * 16
    assert server.answered == before + 48
