"""A server without a model: what a client measures of it is the client.

It answers like an OpenAI-compatible server, streaming as many fixed tokens as are asked for, one
event each, as fast as the socket takes them. A client that gets no more than a few times a real
server's rate out of it is itself a part of what it measures there.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from typing_extensions import Self

TOKEN = " a"
_LARGEST_BODY_BYTES = 64 << 20


class NullServer(ThreadingHTTPServer):
    """Streams /v1/completions and /v1/chat/completions on 127.0.0.1. A context manager."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, model: str) -> None:
        """``model`` is the name it goes by."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model = model
        self.answered = 0
        """Requests so far."""
        self._events = {
            chat: _chunk(_event(model, _choice(chat, TOKEN, None))) for chat in (False, True)
        }
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """Where its API begins."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    def event(self, chat: bool) -> bytes:
        """One token, ready to send."""
        return self._events[chat]

    def count(self) -> None:
        """One more request was answered."""
        with self._lock:
            self.answered += 1

    def __enter__(self) -> Self:
        """Serve in a thread."""
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop."""
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: NullServer

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """List the one model."""
        self._whole(200, {"object": "list", "data": [{"id": self.server.model}]})

    def do_POST(self) -> None:
        """Stream as many tokens as were asked for."""
        length = int(self.headers.get("Content-Length") or 0)
        try:
            body = json.loads(self.rfile.read(min(length, _LARGEST_BODY_BYTES)))
            count = int(body.get("max_tokens") or body["max_completion_tokens"])
        except (ValueError, KeyError, TypeError, AttributeError):
            self._whole(400, {"error": {"message": "max_tokens is missing"}})
            return
        chat = self.path.endswith("/chat/completions")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        token = self.server.event(chat)
        for _ in range(count):
            self.wfile.write(token)
        usage = {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": count + 1}
        self.wfile.write(_chunk(_event(self.server.model, _choice(chat, "", "length"))))
        self.wfile.write(_chunk(_event(self.server.model, {"choices": [], "usage": usage})))
        self.server.count()
        self.wfile.write(_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    def _whole(self, state: int, content: dict[str, Any]) -> None:
        payload = json.dumps(content).encode()
        self.send_response(state)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


def _choice(chat: bool, text: str, reason: str | None) -> dict[str, Any]:
    said: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
    return {"choices": [{"index": 0, "finish_reason": reason} | said]}


def _event(model: str, content: dict[str, Any]) -> bytes:
    kind = "chat.completion.chunk" if "delta" in str(content) else "text_completion"
    whole = {"id": "null", "object": kind, "created": 0, "model": model} | content
    return f"data: {json.dumps(whole)}\n\n".encode()


def _chunk(payload: bytes) -> bytes:
    return f"{len(payload):x}\r\n".encode() + payload + b"\r\n"
