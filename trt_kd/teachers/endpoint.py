"""A client of an OpenAI-compatible server: timeouts, retries with growing pauses, clear errors."""

import http.client
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trt_kd.errors import ServerError

logger = logging.getLogger(__name__)

TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
"""States of a server that may pass."""
LONGEST_PAUSE_S = 60.0
LARGEST_ANSWER_BYTES = 256 << 20


class _Unmoved(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: a key must not reach another host."""

    def redirect_request(self, *_: Any) -> None:
        """Leave the redirect to be an error."""


@dataclass(frozen=True)
class Endpoint:
    """A server and the model that is asked of it."""

    url: str
    """Where its API begins, such as ``http://127.0.0.1:8000/v1``."""
    model: str
    """Name under which the server knows the model."""
    key: str | None = field(default=None, repr=False)
    """Sent as a bearer token."""
    timeout_s: float = 120.0
    """Of one request."""
    retries: int = 5
    """Further attempts after one that may pass."""
    sleep: Callable[[float], None] = time.sleep

    def complete(self, **settings: Any) -> dict[str, Any]:
        """The first choice of a completion.

        Raises:
            ServerError: if the server does not answer, refuses, or answers something else.
        """
        body = {"model": self.model, "max_tokens": 1, "temperature": 0, **settings}
        answer = self._ask("completions", json.dumps(body).encode())
        try:
            choice = answer["choices"][0]
        except (KeyError, IndexError, TypeError):
            choice = None
        if not isinstance(choice, dict):
            raise self.problem(
                "its answer holds no choice", "is this an OpenAI-compatible /v1/completions?"
            )
        return choice

    def problem(self, what: str, hint: str) -> ServerError:
        """The error for an answer that cannot be used."""
        return ServerError(f"{self.url}, model {self.model!r}: {what}", hint=hint)

    def _ask(self, path: str, body: bytes | None) -> Any:
        """Answer of the server, asked again while its trouble may pass."""
        pause_s = 1.0
        for attempt in range(self.retries + 1):
            try:
                return self._once(path, body)
            except urllib.error.HTTPError as error:
                with error:
                    reason = _reason(error)
                    if error.code not in TRANSIENT:
                        raise self._refusal(error.code, reason) from error
                    what = f"HTTP {error.code} {reason}"
                    asked_s = str(error.headers.get("Retry-After") or "")
            except (OSError, http.client.HTTPException) as error:
                what = str(getattr(error, "reason", error) or type(error).__name__)
                asked_s = ""
            if attempt < self.retries:
                wait_s = max(pause_s, float(asked_s)) if asked_s.isdigit() else pause_s
                logger.info("%s: %s; asked again in %.0f s", self.url, what, wait_s)
                self.sleep(min(wait_s, LONGEST_PAUSE_S))
                pause_s *= 2
        raise self.problem(
            f"no answer after {self.retries + 1} attempts: {what}",
            "is the server up, and is url where its /v1 begins? What was cached is kept",
        )

    def _once(self, path: str, body: bytes | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url}/{path}", data=body, headers=headers)
        opener = urllib.request.build_opener(_Unmoved)
        with opener.open(request, timeout=self.timeout_s) as response:
            content = response.read(LARGEST_ANSWER_BYTES + 1)
        try:
            if len(content) > LARGEST_ANSWER_BYTES:
                raise ValueError(f"it has more than {LARGEST_ANSWER_BYTES:,} bytes")
            return json.loads(content)
        except ValueError as error:
            raise self.problem(
                f"its answer is not JSON: {error}", "is url where its /v1 begins?"
            ) from error

    def _refusal(self, code: int, reason: str) -> ServerError:
        if code in {401, 403}:
            return self.problem(
                f"HTTP {code} {reason}", "name the variable that holds the key as teacher.key_env"
            )
        if code == 404:
            return self.problem(f"HTTP 404 {reason}", self._names())
        return self.problem(f"HTTP {code} {reason}", "see the server's log; lower k if it is that")

    def _names(self) -> str:
        """What the server says it has."""
        try:
            names = [str(model["id"]) for model in self._once("models", None)["data"]]
        except (OSError, http.client.HTTPException, ServerError, KeyError, TypeError):
            return "is url where its /v1 begins, and model the name that the server gives it?"
        return f"its models: {', '.join(names[:8])}"


def _reason(error: urllib.error.HTTPError) -> str:
    """What the server says, in one short line."""
    try:
        text = error.read(4096).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        text = ""
    try:
        told = json.loads(text)
        told = told.get("error", told) if isinstance(told, dict) else told
        text = str(told.get("message", told) if isinstance(told, dict) else told)
    except ValueError:
        pass
    return " ".join((text or str(error.reason)).split())[:200]
