"""TensorRT-LLM measured by its own ``trtllm-bench``, 1.2 and 1.3.

The data set is ours: rows of real text that are all different, each with exactly as many output
tokens as asked, end-of-text ignored. Reuse of key-value blocks is off. The tool's TPOT divides by
N - 1, which is right without speculation, where its first content is one token.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import Field, PositiveInt

from trt_kd.backends.load import SHARES, Load, LoadGenerator, LoadRun
from trt_kd.backends.programs import numbers_at, require_program, run_program
from trt_kd.backends.trtllm_container import docker_command
from trt_kd.checkpoints import read_json
from trt_kd.errors import ConfigError, ServerError

PROGRAM = "trtllm-bench"
DATASET, OPTIONS, REPORT = "requests.jsonl", "options.yaml", "report.json"
_STREAMING, _SPEED = "streaming_metrics", "performance"
_PLACES = {
    "output_tokens_per_s": f"{_SPEED}.system_output_throughput_tok_s",
    "total_tokens_per_s": f"{_SPEED}.system_total_throughput_tok_s",
    "requests_per_s": f"{_SPEED}.request_throughput_req_s",
    "tokens_per_s_per_user": f"{_STREAMING}.gen_tps_percentiles.p50",
    "total_latency_ms": f"{_SPEED}.total_latency_ms",
    "requests": "request_info.num_requests",
    "output_length": "request_info.avg_output_length",
}
_TIMES = {
    "ttft_ms": f"{_STREAMING}.ttft_percentiles",
    "itl_ms": f"{_STREAMING}.tpot_percentiles",
    "tpot_ms": f"{_STREAMING}.tpot_percentiles",
    "e2e_ms": f"{_SPEED}.request_latency_percentiles_ms",
}


class TrtllmBench(LoadGenerator):
    """TensorRT-LLM's ``trtllm-bench`` on ``hf-unified`` exports, checkpoints and engines."""

    definitions: ClassVar[Mapping[str, str]] = {
        "itl_ms": "(e2e - ttft) / (N - 1) of a request, by trtllm-bench; median of runs",
        "tpot_ms": "the same as itl_ms",
        "percentile": "of requests of a run, a sample without interpolation; median of runs",
        "tokens_per_s_per_user": "median over requests of the generation rate; median of runs",
        "intervals": "95 %: t interval of logs of runs, none for one run",
    }

    kind: Literal["trtllm-bench"] = "trtllm-bench"
    subcommand: Literal["throughput", "latency"] = "throughput"
    """``latency`` has one request in flight, whatever is asked: only for batch size 1."""
    tensor_parallel: PositiveInt = 1
    """GPUs that share every layer; an engine has its own number."""
    kv_cache_fraction: float = Field(default=0.9, gt=0, lt=1)
    """Share of the GPU's free memory that the key-value cache takes."""

    def check(self, targets: Mapping[str, Path], loads: Sequence[Load]) -> None:
        """See the base class; whether the tool is here is asked once its files are written."""
        if any(load.request_rate is not None for load in loads):
            raise ConfigError(
                "trtllm-bench has no request rates", hint="leave out load_generator.request_rates"
            )
        if self.subcommand == "latency" and any(load.workload.batch_size > 1 for load in loads):
            raise ConfigError(
                "trtllm-bench latency has one request in flight at a time",
                hint="write batch_sizes: [1], or subcommand: throughput",
            )

    def tokenizer_folder(self, target: Path) -> Path:
        """See the base class: an engine keeps the tokenizer apart."""
        return target / "hf" if _is_engine(target) else target

    def run(self, target: Path, load: Load, folder: Path) -> LoadRun:
        """See the base class.

        Raises:
            MissingDependencyError: with a command for the container that reads what stays in
                ``folder``.
        """
        target, folder = target.resolve(), folder.resolve()
        rows = load.prompts[self.warmup(load) :]
        lines = dataset_lines(rows, load.workload.output_tokens)
        (folder / DATASET).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        options = {"kv_cache_config": {"enable_block_reuse": False}}
        (folder / OPTIONS).write_text(yaml.safe_dump(options), encoding="utf-8")
        argv = self.command(target, load, folder)
        require_program(
            PROGRAM,
            "give this trt-kd command in the image of containers/trtllm.Dockerfile, or measure the "
            f"first load there by hand: {docker_command(folder, argv, also=[target])}",
        )
        run_program(argv, folder, self.timeout_s)
        try:
            report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ServerError(
                f"trtllm-bench left no readable report: {error}", hint="run it by hand to see why"
            ) from error
        count = load.workload.output_tokens
        found = read_report(report, requests=len(rows), output_tokens=count)
        end_s = (folder / REPORT).stat().st_mtime
        return replace(
            found, span_s=(end_s - found.report[_SPEED]["total_latency_ms"] / 1e3, end_s)
        )

    def command(self, target: Path, load: Load, folder: Path) -> list[str]:
        """Argument list, valid for 1.2.1 and, but for engines, for 1.3."""
        workload, engine = load.workload, _is_engine(target)
        companions = self.tokenizer_folder(target)
        name = str(read_json(companions / "config.json")["model_type"])
        argv = [PROGRAM, "--model", name, "--model_path", str(companions), self.subcommand]
        argv += ["--dataset", str(folder / DATASET), "--report_json", str(folder / REPORT)]
        argv += ["--num_requests", str(self.requests(load)), "--warmup", str(self.warmup(load))]
        argv += ["--concurrency", str(workload.batch_size)]
        argv += ["--kv_cache_free_gpu_mem_fraction", str(self.kv_cache_fraction)]
        argv += ["--config", str(folder / OPTIONS)]
        if self.subcommand == "throughput":
            argv += ["--streaming"]
        if engine:
            return [*argv, "--backend", "tensorrt", "--engine_dir", str(target)]
        longest = workload.input_tokens + workload.output_tokens
        argv += ["--backend", "pytorch", "--tp", str(self.tensor_parallel)]
        argv += ["--max_seq_len", str(longest)]
        if self.subcommand == "throughput":
            tokens = max(8192, workload.input_tokens + workload.batch_size)
            argv += ["--max_batch_size", str(workload.batch_size), "--max_num_tokens", str(tokens)]
        return argv


def dataset_lines(prompts: Sequence[Sequence[int]], output_tokens: int) -> list[str]:
    """One JSON object per request, as ``trtllm-bench`` reads them.

    Raises:
        ValueError: if two prompts are alike, which a cache would answer.
    """
    if len({tuple(row) for row in prompts}) < len(prompts):
        raise ValueError("two prompts of one run are alike")
    return [
        json.dumps({"task_id": number, "input_ids": list(row), "output_tokens": output_tokens})
        for number, row in enumerate(prompts)
    ]


def read_report(report: Mapping[str, Any], *, requests: int, output_tokens: int) -> LoadRun:
    """Take what is ours from a report of 1.2 or 1.3; fields that we do not know do not matter.

    Raises:
        ServerError: naming every field that is missing, or if the run was not what was asked.
    """
    engine = report.get("engine")
    version = engine.get("version", "?") if isinstance(engine, Mapping) else "?"
    who = f"trtllm-bench {version}"
    every = {f"{name}.{p}": f"{place}.{p}" for name, place in _TIMES.items() for p in SHARES}
    found = numbers_at(report, _PLACES | every, who)
    if found["requests"] != requests or abs(found["output_length"] - output_tokens) > 0.5:
        raise ServerError(
            f"{who} answered {found['requests']:g} requests with {found['output_length']:g} tokens "
            f"each, not {requests} with {output_tokens}",
            hint="it stopped early: see its log, and whether the model takes such lengths",
        )
    rates = {
        "output_tokens_per_s": found["output_tokens_per_s"],
        "input_tokens_per_s": found["total_tokens_per_s"] - found["output_tokens_per_s"],
        "requests_per_s": found["requests_per_s"],
        "tokens_per_s_per_user": found["tokens_per_s_per_user"],
    }
    times = {name: {p: found[f"{name}.{p}"] for p in SHARES} for name in _TIMES}
    return LoadRun(times=times, rates=rates, report=report)


def _is_engine(target: Path) -> bool:
    return (target / "rank0.engine").is_file()
