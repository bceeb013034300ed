"""Options that a teacher cannot do without, a server of a tiny model; ModelOpt, imported once."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from trt_kd.checkpoints import load_model, load_tokenizer
from trt_kd.stages.distill import require_modelopt

require_modelopt()


class ModelServer(ThreadingHTTPServer):
    """Answers /v1/completions from a tiny model, as vLLM does; tests change what it does."""

    daemon_threads = True

    def __init__(self, directory):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = load_model(directory, dtype="float32")
        self.tokenizer = load_tokenizer(directory)
        self.name = "tiny"
        self.bodies, self.headers_seen = [], []
        self.states = []  # HTTP states of the next answers, 200 where empty
        self.delay_s = 0.0
        self.change = lambda choice: choice
        self.text_of = lambda token: self.tokenizer.decode([token])
        self.at_work = self.most_at_work = 0
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def choice(self, body):
        import torch

        ids = body["prompt"]
        with self.lock, torch.no_grad():
            logp = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        k = body.get("prompt_logprobs") or body.get("logprobs")
        entries = [None]
        for position in range(1, len(ids)):
            values, tokens = logp[position - 1].topk(k)
            pairs = dict(zip(tokens.tolist(), values.tolist(), strict=True))
            pairs.setdefault(ids[position], logp[position - 1, ids[position]].item())
            entries.append(pairs)
        if "prompt_logprobs" in body:
            told = [
                entry and {
                    str(token): {"logprob": value, "rank": 1, "decoded_token": self.text_of(token)}
                    for token, value in entry.items()
                }
                for entry in entries
            ]  # fmt: skip
            return {"text": "", "prompt_logprobs": told}
        names = [self.text_of(token) for token in ids]
        top = [e and {self.text_of(token): v for token, v in e.items()} for e in entries]
        return {"text": "", "logprobs": {"tokens": [*names, "x"], "top_logprobs": [*top, {}]}}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        """Say nothing."""

    def do_GET(self):
        self.answer(200, {"data": [{"id": self.server.name}]})

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.headers_seen.append(dict(self.headers))
            state = server.states.pop(0) if server.states else 200
            server.at_work += 1
            server.most_at_work = max(server.most_at_work, server.at_work)
        try:
            state, content = self.found(state, body)
        finally:
            with server.lock:  # before the answer leaves: the next request may be here at once
                server.at_work -= 1
        self.answer(state, content)

    def found(self, state, body):
        server = self.server
        time.sleep(server.delay_s)
        if state != 200:
            return state, {"error": {"message": f"told to say {state}"}}
        if body["model"] != server.name:
            return 404, {"message": f"The model `{body['model']}` does not exist."}
        return 200, {"choices": [server.change(server.choice(body))]}

    def answer(self, state, content):
        payload = json.dumps(content).encode()
        self.send_response(state)
        self.send_header("Content-Length", str(len(payload)))
        if state in (301, 302, 307):
            self.send_header("Location", "/v1/elsewhere")
        if state == 429:
            self.send_header("Retry-After", "7")
        self.end_headers()
        self.wfile.write(payload)


@pytest.fixture
def server(teacher, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    made = ModelServer(teacher.path)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def teacher_options(teacher, request):
    """Options of the teacher of a kind, beside what has a default."""

    def options(kind):
        if kind == "served":
            return {"url": request.getfixturevalue("server").url, "model": "tiny"}
        return {"several": {"others": [str(teacher.path)]}}.get(kind, {})

    return options
