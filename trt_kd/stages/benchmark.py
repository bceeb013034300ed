"""Benchmark: how fast each variant prefills and decodes, all of them in one interleaved run.

Every variant is loaded once, in a process of its own, and takes turns with the others in ABBA
order, so that drift of the machine meets all of them alike. Every run decodes new rows of real
held-out text; variants with the same tokenizer get the same rows. Exactly ``output_tokens`` each.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from typing_extensions import Self

from trt_kd.artifacts import Artifact, writing
from trt_kd.artifacts.environment import environment
from trt_kd.artifacts.manifest import Metric
from trt_kd.backends.base import Backend, backend_for, lane_of
from trt_kd.backends.worker import OutOfMemoryError, Run, Worker
from trt_kd.checkpoints import load_tokenizer
from trt_kd.config import StageConfig
from trt_kd.data.base import DataConfig, fingerprint, token_blocks, tokenizer_digest
from trt_kd.errors import ConfigError
from trt_kd.measuring.clock import measure_call
from trt_kd.measuring.machine import load_average
from trt_kd.measuring.roofline import Peaks, decode_floor_ms, measure_peaks
from trt_kd.measuring.statistics import half_range, median, percentiles

if TYPE_CHECKING:
    import numpy as np

SCHEMA_VERSION = 1


class BenchmarkConfig(StageConfig):
    """Workloads, and how often each is measured."""

    stage: ClassVar[str] = "benchmark"

    data: DataConfig = DataConfig()
    """Text whose held-out split the prompts are cut from; its ``block_tokens`` has no say here."""
    batch_sizes: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 4, 8)
    """Sequences decoded together; measured from the first to the last."""
    input_tokens: PositiveInt = 128
    """Prompt tokens of every sequence (ISL)."""
    output_tokens: PositiveInt = 32
    """Tokens decoded for every sequence (OSL), end-of-text ignored."""
    warmup: NonNegativeInt = 1
    """Runs of every variant and batch size that do not count."""
    repeats: PositiveInt = 5
    """Runs that count."""
    spread_limit: PositiveFloat = 0.25
    """Largest half range of the throughput over its median that still counts as steady."""
    seed: int = 0
    """Order of the documents."""
    threads: PositiveInt | None = None
    """CPU threads of every runtime; None leaves the choice to the runtime."""

    def outside(self) -> dict[str, str]:
        """Fingerprint of the text."""
        return self.data.outside()

    def rehearsal(self) -> Self:
        """One short run of the first batch size."""
        few = {"input_tokens": 16, "output_tokens": 4, "warmup": 0, "repeats": 1}
        return self.model_copy(update={"batch_sizes": self.batch_sizes[:1], **few})


@dataclass(frozen=True)
class Turn:
    """One run of one variant."""

    variant: str
    batch_size: int
    repeat: int
    """Counts from 0; warm-up runs are below 0."""
    rows: slice
    """Which prompts, of all that were cut."""


@dataclass
class Samples:
    """All counted runs of one variant at one batch size."""

    runs: list[Run] = field(default_factory=list)
    load_averages: list[float] = field(default_factory=list)
    error: str | None = None
    """Why there is no measurement: not enough memory."""


def benchmark(config: BenchmarkConfig, *, out: Path, **variants: Artifact) -> Artifact:
    """Measure ``variants``, checkpoints and exports by name, and write the records to ``out``.

    Raises:
        ConfigError: if there is no variant.
        ArtifactError: if no backend runs a variant.
        DataError: if there is too little held-out text for prompts that never repeat.
        TrtKdError: if a variant cannot be loaded or its process dies.
    """
    if not variants:
        raise ConfigError("a benchmark needs at least one variant", hint="name a checkpoint")
    backends = {
        name: backend_for(artifact).model_copy(update={"threads": config.threads})
        for name, artifact in variants.items()
    }
    with writing(out, kind="benchmark", config=config, inputs=variants) as draft:
        prompts = _prompts(config, variants)
        peaks = measure_peaks(config.threads)
        found: dict[tuple[str, int], Samples] = {}
        with ExitStack() as stack:
            workers = {
                name: stack.enter_context(Worker(name, backends[name], artifact.path))
                for name, artifact in variants.items()
            }
            seconds = measure_call(lambda: found.update(_measure_all(config, workers, prompts)))
        records: dict[str, list[dict[str, Any]]] = {
            name: [
                _describe(config, artifact, backends[name], batch_size)
                | _floor(config, artifact, backends[name], batch_size, peaks)
                | _measured(config, found[name, batch_size], batch_size)
                | {"load_s": workers[name].load_s}
                for batch_size in config.batch_sizes
            ]
            for name, artifact in variants.items()
        }
        result = {
            "schema_version": SCHEMA_VERSION,
            "hardware": environment(),
            "peaks": asdict(peaks),
            "variants": records,
        }
        _write_json(draft.path / "benchmark.json", result)
        _write_samples(draft.path / "samples.jsonl", found)
        draft.metrics |= {
            "seconds": seconds,
            "steady": all(item.get("steady", True) for rows in records.values() for item in rows),
            "prompts_sha256": {name: fingerprint(rows) for name, rows in prompts.items()},
            "variants": {name: _summary(rows) for name, rows in records.items()},
        }
    return Artifact.open(out, expect="benchmark")


def turns(config: BenchmarkConfig, names: list[str]) -> Iterator[Turn]:
    """Every run in its order: A B, then B A, and so on, batch size by batch size.

    Each round cuts rows that no other round uses; all variants of a round get the same.
    """
    used = 0
    for batch_size in config.batch_sizes:
        for count, repeat in enumerate(range(-config.warmup, config.repeats)):
            rows = slice(used, used + batch_size)
            used += batch_size
            for name in names if count % 2 == 0 else reversed(names):
                yield Turn(name, batch_size, repeat, rows)


def _prompts(config: BenchmarkConfig, variants: Mapping[str, Artifact]) -> "dict[str, np.ndarray]":
    """Token ids ``[rows, input_tokens]`` by variant."""
    rows = sum(config.batch_sizes) * (config.warmup + config.repeats)
    data = config.data.model_copy(update={"block_tokens": config.input_tokens})
    cut: dict[str, np.ndarray] = {}
    prompts = {}
    for name, artifact in variants.items():
        tokenizer = load_tokenizer(artifact.path)
        digest = tokenizer_digest(tokenizer)
        if digest not in cut:
            cut[digest] = token_blocks(
                data, tokenizer, split="heldout", count=rows, seed=config.seed
            )
        prompts[name] = cut[digest]
    return prompts


def _measure_all(
    config: BenchmarkConfig, workers: Mapping[str, Worker], prompts: "Mapping[str, np.ndarray]"
) -> dict[tuple[str, int], Samples]:
    """Let the variants take turns; a workload that does not fit in memory is left out."""
    from tqdm import tqdm

    found = {(name, size): Samples() for name in workers for size in config.batch_sizes}
    order = list(turns(config, list(workers)))
    for turn in tqdm(order, desc="benchmark", unit="run", disable=None):
        samples = found[turn.variant, turn.batch_size]
        if samples.error is not None:
            continue
        rows = prompts[turn.variant][turn.rows].tolist()
        try:
            run = workers[turn.variant].run(rows, config.output_tokens)
        except OutOfMemoryError as error:
            samples.error = str(error.args[0])
            continue
        if turn.repeat >= 0:
            samples.runs.append(run)
            samples.load_averages.append(load_average() or 0.0)
    return found


def _describe(
    config: BenchmarkConfig, artifact: Artifact, backend: Backend, batch_size: int
) -> dict[str, Metric]:
    return {
        "backend": backend.kind,
        "format": format_of(artifact),
        "batch_size": batch_size,
        "input_tokens": config.input_tokens,
        "output_tokens": config.output_tokens,
    }


def format_of(artifact: Artifact) -> str:
    """Number format a variant is served in: its lane's precision, or transformers' default."""
    if artifact.manifest.kind == "checkpoint":
        return "bf16" if environment()["gpu"] else "fp32"
    lane = lane_of(artifact)
    return str(lane.get("precision", lane["kind"]))


def _floor(
    config: BenchmarkConfig, artifact: Artifact, backend: Backend, batch_size: int, peaks: Peaks
) -> dict[str, Metric]:
    """Least milliseconds of the mean decoding step; None where the backend does not know."""
    work = backend.decode_work(artifact.path)
    if work is None:
        return {"decode_floor_ms": None}
    tokens = config.input_tokens + config.output_tokens / 2
    return {"decode_floor_ms": decode_floor_ms(work, peaks, batch_size=batch_size, tokens=tokens)}


def _measured(config: BenchmarkConfig, samples: Samples, batch_size: int) -> dict[str, Metric]:
    """Statistics of one workload; runs are the unit of replication of rates and spread."""
    if samples.error is not None:
        return {"error": samples.error}
    runs = samples.runs
    gaps = [seconds for run in runs for seconds in run.step_s[1:]]
    rates = [batch_size * config.output_tokens / sum(run.step_s) for run in runs]
    spread = half_range(rates)
    return {
        "ttft_ms": percentiles([1e3 * run.step_s[0] for run in runs]),
        "itl_ms": percentiles([1e3 * gap for gap in gaps]) if gaps else None,
        "output_tokens_per_s": median(rates),
        "repeats": len(runs),
        "spread": spread,
        "steady": spread <= config.spread_limit,
        "load_average": max(samples.load_averages),
        "peak_memory_bytes": max(run.peak_memory_bytes for run in runs),
    }


def _summary(records: list[dict[str, Any]]) -> dict[str, Metric]:
    """Main numbers of one variant, by batch size."""
    summary: dict[str, Metric] = {}
    for record in records:
        key = f"batch_{record['batch_size']}"
        if "error" in record:
            summary[key] = {"error": record["error"]}
            continue
        itl = record["itl_ms"]
        summary[key] = {
            "ttft_ms_p50": record["ttft_ms"]["p50"],
            "itl_ms_p50": itl["p50"] if itl else None,
            "output_tokens_per_s": record["output_tokens_per_s"],
            "spread": record["spread"],
        }
    return summary


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_samples(path: Path, found: Mapping[tuple[str, int], Samples]) -> None:
    """One line per counted run: seconds of every step, the first with prefill."""
    lines = [
        json.dumps({"variant": name, "batch_size": size, "repeat": repeat, "step_s": run.step_s})
        for (name, size), samples in found.items()
        for repeat, run in enumerate(samples.runs)
    ]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
