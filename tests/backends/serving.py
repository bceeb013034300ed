"""A server of a tiny model on this machine, as far as a load generator asks; tests change it."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from trt_kd.backends import BACKENDS
from trt_kd.checkpoints import load_tokenizer

NAME = "tiny"


class TinyServer(ThreadingHTTPServer):
    """Streams /v1/completions token by token; one model, requests in turn."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, directory):
        super().__init__(("127.0.0.1", 0), Handler)
        self.session = BACKENDS.load("transformers")(threads=1).load(directory)
        self.tokenizer = load_tokenizer(directory)
        self.lock = threading.Lock()
        self.bodies, self.keys = [], set()
        self.state = 200
        self.stops_after = None  # tokens after which a stream ends, as if at end-of-text

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Say nothing."""

    def do_GET(self):
        self.answer(200, {"data": [{"id": NAME}]})

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.keys.add(self.headers.get("Authorization"))
        if server.state != 200:
            self.answer(server.state, {"error": {"message": f"told to say {server.state}"}})
        elif body["model"] != NAME:
            self.answer(404, {"error": {"message": f"no model {body['model']}"}})
        else:
            self.stream(body)

    def stream(self, body):
        server = self.server
        prompt = server.tokenizer(body["prompt"])["input_ids"]
        asked = body["max_tokens"]
        count = min(asked, server.stops_after or asked)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with server.lock:
            for _ in server.session.steps([prompt], count):
                self.event({"choices": [{"index": 0, "text": " a", "finish_reason": None}]})
        usage = {"prompt_tokens": len(prompt), "completion_tokens": count}
        usage["total_tokens"] = sum(usage.values())
        self.event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        self.event({"choices": [], "usage": usage})
        self.chunk(b"data: [DONE]\n\n")
        self.chunk(b"")

    def event(self, content):
        whole = {"id": "c", "object": "text_completion", "created": 1, "model": NAME} | content
        self.chunk(f"data: {json.dumps(whole)}\n\n".encode())

    def chunk(self, payload):
        self.wfile.write(f"{len(payload):x}\r\n".encode() + payload + b"\r\n")
        self.wfile.flush()

    def answer(self, state, content):
        payload = json.dumps(content).encode()
        self.send_response(state)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)
