"""Any OpenAI-compatible server, loaded and timed by NVIDIA's AIPerf (https://github.com/ai-dynamo).

AIPerf runs as a process of its own and may live in an environment of its own: only its command
must be on the path. All its settings are in a file that this module writes; a server's key is
named there by its environment variable and stands nowhere. The warm-up takes the first rows of the
data set and the counted requests take the rest, so no prompt is sent twice.
"""

import http.client
import json
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import Field, PositiveFloat, model_validator
from typing_extensions import Self

from trt_kd.backends.load import SHARES, Load, LoadGenerator, LoadRun
from trt_kd.backends.null_server import NullServer
from trt_kd.backends.programs import numbers_at, require_program, run_program
from trt_kd.checkpoints import load_tokenizer
from trt_kd.config import KeyVariable, ServerAddress, StrictModel
from trt_kd.errors import ConfigError, ServerError

PROGRAM = "aiperf"
REPORT = "profile_export_aiperf.json"
_PATIENCE_S = 10.0
_TIMES = {
    "ttft_ms": "time_to_first_token",
    "itl_ms": "inter_chunk_latency",
    "tpot_ms": "inter_token_latency",
    "e2e_ms": "request_latency",
}
_NUMBERS = {
    "output_tokens_per_s": "output_token_throughput.avg",
    "requests_per_s": "request_throughput.avg",
    "requests": "request_count.avg",
    "output_length": "output_sequence_length.avg",
    "input_length": "input_sequence_length.avg",
}


_PER_USER = {"tokens_per_s_per_user": "output_token_throughput_per_user.p50"}
"""AIPerf leaves it out where an answer's tokens came all at once: that says nothing of a rate."""


class Slo(StrictModel):
    """Limits that a request must meet, all together, to count as good."""

    ttft_ms: PositiveFloat | None = None
    """Time to the first token."""
    tpot_ms: PositiveFloat | None = None
    """Time per output token after it."""
    e2e_ms: PositiveFloat | None = None
    """The whole request."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.model_dump(exclude_none=True):
            raise ValueError("name at least one of ttft_ms, tpot_ms and e2e_ms")
        return self


class OpenaiServer(LoadGenerator):
    """A running OpenAI-compatible server, measured by AIPerf: concurrency, request rates, SLOs."""

    definitions: ClassVar[Mapping[str, str]] = {
        "itl_ms": "gap between two contents of a request after the first, pooled over requests; "
        "AIPerf's inter-chunk latency; median of runs",
        "tpot_ms": "AIPerf's inter-token latency, one value per request; median of runs",
        "tokens_per_s_per_user": "median over requests of 1000 / tpot_ms; median of runs",
        "goodput_requests_per_s": "requests per second that met every limit of slo",
        "percentile": "linear interpolation over requests of a run; median of runs",
        "intervals": "95 %: t interval of logs of runs, none for one run",
    }

    kind: Literal["openai-server"] = "openai-server"
    url: ServerAddress
    """Where its API begins, such as ``http://127.0.0.1:8000/v1``; not kept in the artifact."""
    model: Annotated[str, Field(min_length=1)]
    """Name of the model at the server, which must serve the variant that is benchmarked."""
    endpoint: Literal["completions", "chat"] = "completions"
    """``chat`` wraps the prompts in the model's template: they are then longer than asked."""
    length: Literal["exact", "natural"] = "exact"
    """``exact`` asks the server to ignore end-of-text (vLLM, SGLang and TensorRT-LLM can) and
    refuses shorter answers; ``natural`` lets them end, ``output_tokens`` being the most."""
    slo: Slo | None = None
    """What makes a request good, for goodput."""
    null_server: bool = True
    """Whether the client is measured alone as well, once for every number of requests in flight,
    against a server without a model; below 3 times the rate a record decides no gate."""
    key_env: KeyVariable = None
    """Environment variable that holds the server's key; the key is never stored."""

    def check(self, targets: Mapping[str, Path], loads: Sequence[Load]) -> None:
        """See the base class: AIPerf is there, the server answers and knows the model."""
        if len(targets) != 1:
            raise ConfigError(
                f"a server serves one variant, this benchmark has {len(targets)}",
                hint="benchmark one after the other: each server while it runs",
            )
        require_program(
            PROGRAM,
            "pip install 'aiperf>=0.13' (Python 3.11 or later, best in an environment of its own) "
            "and put its command on the PATH",
        )
        if self.key_env is not None and not os.environ.get(self.key_env):
            raise ConfigError(f"{self.key_env} is not set", hint="export it with the server's key")
        names = self._models()
        if self.model not in names:
            raise ServerError(
                f"the server has no model {self.model!r}",
                hint=f"load_generator.model must be one of: {', '.join(names[:8]) or '(none)'}",
            )

    def run(self, target: Path, load: Load, folder: Path) -> LoadRun:
        """See the base class."""
        tokenizer = load_tokenizer(target)
        count = load.workload.output_tokens
        lines = [
            json.dumps({"text": tokenizer.decode(list(row)), "output_length": count})
            for row in load.prompts
        ]
        text = "".join(f"{line}\n" for line in lines)
        (folder / "prompts.jsonl").write_text(text, encoding="utf-8")
        settings = self.settings(target.resolve(), load, folder.resolve())
        (folder / "aiperf.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        # AIPerf 0.13 takes no local tokenizer where these are set
        online = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"}
        env = {name: value for name, value in os.environ.items() if name not in online}
        argv = [PROGRAM, "profile", "--config", str(folder.resolve() / "aiperf.yaml")]
        run_program(argv, folder, self.timeout_s, env)
        try:
            report = json.loads((folder / "out" / REPORT).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ServerError(
                f"aiperf left no readable report: {error}", hint="is the server still up?"
            ) from error
        exact = count if self.length == "exact" else None
        return read_report(report, requests=self.requests(load), output_tokens=exact)

    def run_without_model(self, target: Path, load: Load, folder: Path) -> LoadRun | None:
        """See the base class: AIPerf against a server that only streams."""
        if not self.null_server or load.request_rate is not None:
            return None
        with NullServer(self.model) as server:
            alone = self.model_copy(update={"url": server.url, "key_env": None})
            return alone.run(target, load, folder)

    def serves_here(self) -> bool:
        """See the base class: whether the address is one of this machine's."""
        return _is_own(urlsplit(self.url).hostname or "")

    def limits(self) -> Mapping[str, float]:
        """See the base class."""
        return {} if self.slo is None else self.slo.model_dump(exclude_none=True)

    def settings(self, target: Path, load: Load, folder: Path) -> dict[str, Any]:
        """Content of AIPerf's file for one run."""
        parts = urlsplit(self.url)
        tail = "chat/completions" if self.endpoint == "chat" else "completions"
        count = load.workload.output_tokens
        extra = {"ignore_eos": True, "min_tokens": count} if self.length == "exact" else {}
        endpoint: dict[str, Any] = {
            "url": f"{parts.scheme}://{parts.netloc}",
            "path": f"{parts.path}/{tail}",
            "type": self.endpoint,
            "streaming": True,
            "timeout": self.timeout_s,
            "useLegacyMaxTokens": True,
            "useServerTokenCount": True,
            "extra": extra | {"temperature": 0},
        }
        if self.key_env is not None:
            endpoint["apiKey"] = f"${{{self.key_env}}}"
        benchmark: dict[str, Any] = {
            "model": self.model,
            "endpoint": endpoint,
            "tokenizer": {"name": str(target)},
            "dataset": {
                "type": "file",
                "path": str(folder / "prompts.jsonl"),
                "format": "single_turn",
                "sampling": "sequential",
            },
            "phases": [
                _phase("warmup", load, self.warmup(load)) | {"excludeFromResults": True},
                _phase("profiling", load, self.requests(load)),
            ],
            "artifacts": {"dir": str(folder / "out"), "summary": ["json"], "records": False},
            "gpuTelemetry": {"enabled": False},
            "serverMetrics": {"enabled": False},
            "runtime": {"ui": "none"},
        }
        if self.slo is not None:
            limits = self.limits()
            benchmark["slos"] = {_TIMES[name]: value for name, value in limits.items()}
        return {"schemaVersion": "2.0", "randomSeed": 0, "benchmark": benchmark}

    def _models(self) -> list[str]:
        headers = {}
        if self.key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.key_env]}"
        request = urllib.request.Request(f"{self.url}/models", headers=headers)
        hint = "is the server up, and is load_generator.url where its /v1 begins?"
        try:
            with urllib.request.urlopen(request, timeout=_PATIENCE_S) as response:
                return [str(model["id"]) for model in json.loads(response.read(1 << 20))["data"]]
        except urllib.error.HTTPError as error:
            raise ServerError(f"the server answers HTTP {error.code}", hint=hint) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ServerError(f"the server does not answer: {reason}", hint=hint) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError("the server lists no models", hint=hint) from error


def _is_own(host: str) -> bool:
    """Whether ``host`` is this machine: an address that a socket here can be bound to."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, _, _, address in found:
        with socket.socket(family, kind) as probe, suppress(OSError):
            probe.bind(address)
            return True
    return False


def _span(report: Mapping[str, Any]) -> tuple[float, float] | None:
    """When the requests that count began and ended; AIPerf writes this machine's local time."""
    try:
        start, end = (datetime.fromisoformat(report[name]) for name in ("start_time", "end_time"))
    except (KeyError, TypeError, ValueError):
        return None
    return start.timestamp(), end.timestamp()


def _phase(name: str, load: Load, requests: int) -> dict[str, Any]:
    if load.request_rate is not None:
        return {"name": name, "type": "poisson", "rate": load.request_rate, "requests": requests}
    size = load.workload.batch_size
    return {"name": name, "type": "concurrency", "concurrency": size, "requests": requests}


def read_report(report: Mapping[str, Any], *, requests: int, output_tokens: int | None) -> LoadRun:
    """Take what is ours from AIPerf's report; ``output_tokens`` None where lengths are natural.

    Raises:
        ServerError: naming every field that is missing, or if requests failed or stopped early.
    """
    who = f"aiperf {report.get('aiperf_version', '?')}"
    failures = report.get("error_summary") or []
    if failures:
        told = " ".join(json.dumps(failures[0]).split())[:200]
        raise ServerError(
            f"requests failed under {who}: {told}",
            hint="see the server's log; a smaller load may pass",
        )
    every = {f"{name}.{p}": f"{place}.{p}" for name, place in _TIMES.items() for p in SHARES}
    found = numbers_at(report, _NUMBERS | every, who)
    if found["requests"] != requests:
        raise ServerError(
            f"{who} counted {found['requests']:g} answers, not {requests}",
            hint="the server stopped early: see its log",
        )
    if output_tokens is not None and abs(found["output_length"] - output_tokens) > 0.5:
        raise ServerError(
            f"answers had {found['output_length']:g} tokens, not {output_tokens}",
            hint="the server stops at end-of-text: let it ignore_eos, or say length: natural",
        )
    paced = "output_token_throughput_per_user" in report
    per_user = numbers_at(report, _PER_USER, who) if paced else {}
    rates = {
        "output_tokens_per_s": found["output_tokens_per_s"],
        "input_tokens_per_s": found["requests_per_s"] * found["input_length"],
        "requests_per_s": found["requests_per_s"],
        "tokens_per_s_per_user": per_user.get("tokens_per_s_per_user"),
    }
    good = report.get("goodput")
    return LoadRun(
        times={name: {p: found[f"{name}.{p}"] for p in SHARES} for name in _TIMES},
        rates=rates,
        report=_numbers_only(report),
        goodput_requests_per_s=float(good["avg"]) if good else None,
        span_s=_span(report),
    )


def _numbers_only(report: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the metrics: settings and addresses are not kept."""
    found = {
        name: value
        for name, value in report.items()
        if isinstance(value, Mapping) and "unit" in value
    }
    return found | {"aiperf_version": report.get("aiperf_version")}
