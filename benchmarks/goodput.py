"""How many requests per second a served model answers within limits, by requests in flight.

    python benchmarks/goodput.py MODEL [--slo ttft_ms=2000 tpot_ms=250] [--work DIR]

Serves a checkpoint on 127.0.0.1 by ``transformers serve`` with continuous batching, which needs
``pip install 'transformers[serving]'`` (in another environment: ``--python``), drives it by AIPerf
and writes the report. The server runs in float32 on half of the cores, since the client works on
the same machine, and ignores end-of-text. Measured loads are not measured again. Prints a table,
then one line of JSON.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from trt_kd.artifacts import Artifact
from trt_kd.artifacts.environment import environment
from trt_kd.config import validate
from trt_kd.errors import ServerError, TrtKdError
from trt_kd.stages.benchmark import BenchmarkConfig, benchmark
from trt_kd.stages.report import ReportConfig, read_report, report

NAME = "local/student"
"""What the model is called at the server."""
SERVED = (".json", ".jinja", ".safetensors", ".model")
"""Files of a checkpoint that a server reads."""
GENERATION = "generation_config.json"
REVISION = "0" * 40
PATIENCE_S = 120.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="goodput of a served checkpoint")
    parser.add_argument("model", type=Path, help="checkpoint artifact")
    parser.add_argument("--work", type=Path, default=Path("runs/goodput"))
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter that has transformers[serving]"
    )
    parser.add_argument(
        "--threads", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="of the server"
    )
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=24)
    parser.add_argument("--requests-per-slot", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--slo",
        nargs="+",
        default=["ttft_ms=2000", "tpot_ms=250"],
        help="limits of a good request: ttft_ms=, tpot_ms=, e2e_ms=",
    )
    parser.add_argument("--data", type=json.loads, default={}, help="text, as in a recipe")
    given = parser.parse_args(arguments)
    try:
        result = measured(given)
    except TrtKdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(result))
    print(json.dumps(result))
    return 0


def measured(given: argparse.Namespace) -> dict[str, Any]:
    """Serve, load, report."""
    student = Artifact.open(given.model, expect="checkpoint")
    place = given.work / "benchmark"
    if place.is_dir():
        made = Artifact.open(place, expect="benchmark")
    else:
        with served(student.path, given) as url:
            made = benchmark(settings(given, url), out=place, student=student)
    page = given.work / "report"
    if not page.is_dir():
        config = ReportConfig(title="Goodput of a served student", baseline="student")
        report(config, out=page, **{"student.model": student, "benchmark": made})
    (row,) = read_report(page).variants
    return {
        "hardware": environment(),
        "server": "transformers serve, continuous batching, float32",
        "server_threads": given.threads,
        "parameters": row.parameters,
        "load_generator": made.manifest.config["load_generator"],
        "loads": [record.model_dump(mode="json") for record in row.load],
    }


def settings(given: argparse.Namespace, url: str) -> BenchmarkConfig:
    """What AIPerf is to send; the server takes no ``ignore_eos``, but see ``laid_out``."""
    limits = {name: float(value) for name, _, value in (each.partition("=") for each in given.slo)}
    tool = {
        "kind": "openai-server",
        "url": url,
        "model": NAME,
        "length": "natural",
        "slo": limits,
        "requests_per_slot": given.requests_per_slot,
    }
    return validate(
        BenchmarkConfig,
        {
            "data": given.data,
            "batch_sizes": given.in_flight,
            "input_tokens": given.input_tokens,
            "output_tokens": given.output_tokens,
            "repeats": given.repeats,
            "load_generator": tool,
        },
        where="goodput",
    )


@contextmanager
def served(checkpoint: Path, given: argparse.Namespace) -> Iterator[str]:
    """Serve ``checkpoint`` while the block runs; yield where its API begins.

    Raises:
        ServerError: if the server ends or stays silent.
    """
    hub = laid_out(checkpoint, given.work / "hub")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [given.python, "-m", "transformers.cli.transformers", "serve", NAME]
    argv += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    argv += ["--continuous-batching"]
    env = os.environ | {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    env["OMP_NUM_THREADS"] = str(given.threads)
    log = given.work / "server.log"
    with log.open("wb") as file:
        server = subprocess.Popen(argv, env=env, stdout=file, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(server, f"{url}/health", log)
        yield f"{url}/v1"
    finally:
        server.terminate()
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()


def laid_out(checkpoint: Path, hub: Path) -> Path:
    """A cache of the Hub that holds the checkpoint as links: only such models are listed.

    Its generation settings are its own: without an end-of-text every answer has the length asked.
    """
    folder = hub / f"models--{NAME.replace('/', '--')}"
    snapshot = folder / "snapshots" / REVISION
    for made in (snapshot, folder / "refs"):
        made.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(REVISION, encoding="utf-8")
    for path in checkpoint.iterdir():
        link = snapshot / path.name
        if path.suffix in SERVED and path.name != GENERATION and not link.is_symlink():
            link.symlink_to(path.resolve())
    told = json.loads((checkpoint / GENERATION).read_text(encoding="utf-8"))
    text = json.dumps(told | {"eos_token_id": -1})
    (snapshot / GENERATION).write_text(text, encoding="utf-8")
    return hub.resolve()


def _wait(server: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    end = monotonic() + PATIENCE_S
    while monotonic() < end:
        if server.poll() is not None:
            told = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise ServerError(
                f"the server ended at once: {told[-1] if told else 'it said nothing'}",
                hint="pip install 'transformers[serving]', or name an interpreter that has it as "
                "--python",
            )
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            sleep(0.2)
    raise ServerError(f"the server did not answer in {PATIENCE_S:.0f} s", hint=f"see {log}")


def table(result: dict[str, Any]) -> str:
    """A row for every number of requests in flight, as Markdown."""
    machine, slo = result["hardware"], result["load_generator"]["slo"]
    limits = ", ".join(f"{name} at most {ms:g}" for name, ms in slo.items() if ms is not None)
    server = f"{result['server']}, {result['server_threads']} thread(s)"
    lines = [
        f"{machine['processor']}, {machine['cores']} cores; {server}; good: {limits}",
        "",
        "| In flight | TTFT p50 (ms) | TPOT p50 (ms) | Tok/s | Requests/s | Goodput/s | Client |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for one in result["loads"]:
        headroom = one["client_headroom"]
        client = "" if headroom is None else f"{headroom:.1f}x"
        lines.append(
            f"| {one['concurrency']} | {one['ttft_ms']['p50']:.0f} | {one['tpot_ms']['p50']:.1f} "
            f"| {one['output_tokens_per_s']:.0f} | {one['requests_per_s']:.2f} "
            f"| {one['goodput_requests_per_s']:.2f} | {client} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
