"""Benchmark: how fast each variant prefills and decodes, all of them in one interleaved run.

Every variant is loaded once, in a process of its own, and takes turns with the others in ABBA
order, so that drift of the machine meets all of them alike. Every run decodes new rows of real
held-out text; variants with the same tokenizer get the same rows. Exactly ``output_tokens`` each.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator
from typing_extensions import Self

from trt_kd.artifacts import Artifact, writing
from trt_kd.artifacts.environment import environment
from trt_kd.artifacts.manifest import Metric
from trt_kd.backends.base import Backend, backend_for, lane_of
from trt_kd.backends.interleaved import Samples, interleave, record, sample_lines
from trt_kd.backends.worker import Worker
from trt_kd.checkpoints import load_tokenizer
from trt_kd.config import StageConfig
from trt_kd.data.base import DataConfig, fingerprint, token_blocks, tokenizer_digest
from trt_kd.errors import ConfigError
from trt_kd.measuring.clock import Workload, measure_call
from trt_kd.measuring.machine import affinity, load_average
from trt_kd.measuring.metrics import DEFINITIONS
from trt_kd.measuring.roofline import Peaks, decode_floor_ms, measure_peaks
from trt_kd.measuring.rounds import Rounds

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
    warmup: NonNegativeInt = 6
    """Most rounds before a batch size counts; fewer once the last three agree, variant by variant.
    They repeat rows of their own."""
    warmup_tolerance: PositiveFloat = 0.02
    """How far the times of three warm-up runs may lie from their median, as a share of it."""
    repeats: PositiveInt = 5
    """Runs that count."""
    spread_limit: PositiveFloat = 0.25
    """Largest half range of the throughput over its median that still counts as steady; what is
    not steady decides no gate."""
    seed: int = 0
    """Order of the documents."""
    threads: PositiveInt | None = None
    """CPU threads of every runtime; None leaves the choice to the runtime."""

    @property
    def rounds(self) -> Rounds:
        """Every workload, and how often."""
        lengths = {"input_tokens": self.input_tokens, "output_tokens": self.output_tokens}
        return Rounds(
            workloads=tuple(Workload(batch_size=size, **lengths) for size in self.batch_sizes),
            repeats=self.repeats,
            warmup=self.warmup,
        )

    @field_validator("batch_sizes")
    @classmethod
    def _stand_once(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(sizes)) < len(sizes):
            raise ValueError("a batch size stands twice")
        return sizes

    def outside(self) -> dict[str, str]:
        """Fingerprint of the text."""
        return self.data.outside()

    def rehearsal(self) -> Self:
        """One short run of the first batch size."""
        few = {"input_tokens": 16, "output_tokens": 4, "warmup": 0, "repeats": 1}
        return self.model_copy(update={"batch_sizes": self.batch_sizes[:1], **few})


def benchmark(config: BenchmarkConfig, *, out: Path, **variants: Artifact) -> Artifact:
    """Measure ``variants``, checkpoints and exports by name, and write the records to ``out``.

    A workload that fails is recorded with its reason and the others are measured.

    Raises:
        ConfigError: if there is no variant.
        ArtifactError: if no backend runs a variant.
        DataError: if there is too little held-out text for prompts that never repeat.
        TrtKdError: if a variant cannot be loaded, or fails at every workload.
    """
    if not variants:
        raise ConfigError("a benchmark needs at least one variant", hint="name a checkpoint")
    backends = {
        name: backend_for(artifact).model_copy(update={"threads": config.threads})
        for name, artifact in variants.items()
    }
    with writing(out, kind="benchmark", config=config, inputs=variants) as draft:
        prompts = prompts_of(config, variants, config.rounds.rows)
        conditions = {"affinity": affinity(), "load_average_before": load_average()}
        peaks = measure_peaks(config.threads)
        records, lines, seconds = _decoded(config, variants, backends, prompts, peaks)
        result = {
            "schema_version": SCHEMA_VERSION,
            "hardware": environment(),
            "conditions": conditions | {"load_average_after": load_average()},
            "definitions": DEFINITIONS,
            "peaks": asdict(peaks),
            "variants": records,
        }
        _write_json(draft.path / "benchmark.json", result)
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (draft.path / "samples.jsonl").write_text(text, encoding="utf-8")
        draft.metrics |= {
            "seconds": seconds,
            "steady": all(item.get("steady", True) for rows in records.values() for item in rows),
            "prompts_sha256": {name: fingerprint(rows) for name, rows in prompts.items()},
            "variants": {name: _summary(rows) for name, rows in records.items()},
        }
    return Artifact.open(out, expect="benchmark")


def prompts_of(
    config: BenchmarkConfig, variants: Mapping[str, Artifact], rows: int
) -> "dict[str, np.ndarray]":
    """Token ids ``[rows, input_tokens]`` by variant; the same where tokenizers are the same."""
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


def _decoded(
    config: BenchmarkConfig,
    variants: Mapping[str, Artifact],
    backends: Mapping[str, Backend],
    prompts: "Mapping[str, np.ndarray]",
    peaks: Peaks,
) -> tuple[dict[str, list[dict[str, Any]]], Sequence[dict[str, Any]], float]:
    """Records by variant, raw runs, and seconds, of variants that decode step by step."""
    found: dict[tuple[str, Workload], Samples] = {}
    rounds, tolerance = config.rounds, config.warmup_tolerance
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(name, backends[name], artifact.path))
            for name, artifact in variants.items()
        }
        seconds = measure_call(
            lambda: found.update(interleave(workers, prompts, rounds, tolerance=tolerance))
        )
    limits = {"spread_limit": config.spread_limit, "tolerance": tolerance}
    records: dict[str, list[dict[str, Any]]] = {
        name: [
            {"backend": backends[name].kind, "format": format_of(artifact)}
            | workload.model_dump()
            | _floor(artifact, backends[name], workload, peaks)
            | record(found[name, workload], workload, **limits)
            | {"load_s": workers[name].load_s}
            for workload in rounds.workloads
        ]
        for name, artifact in variants.items()
    }
    return records, sample_lines(found), seconds


def format_of(artifact: Artifact) -> str:
    """Number format a variant is served in: its lane's precision, or transformers' default."""
    if artifact.manifest.kind == "checkpoint":
        return "bf16" if environment()["gpu"] else "fp32"
    lane = lane_of(artifact)
    return str(lane.get("precision", lane["kind"]))


def _floor(
    artifact: Artifact, backend: Backend, workload: Workload, peaks: Peaks
) -> dict[str, Metric]:
    """Least milliseconds of the mean decoding step; None where the backend does not know."""
    work = backend.decode_work(artifact.path)
    if work is None:
        return {"decode_floor_ms": None}
    size, tokens = workload.batch_size, workload.input_tokens + workload.output_tokens / 2
    return {"decode_floor_ms": decode_floor_ms(work, peaks, batch_size=size, tokens=tokens)}


def _summary(records: list[dict[str, Any]]) -> dict[str, Metric]:
    """Main numbers of one variant, by batch size."""
    summary: dict[str, Metric] = {}
    for item in records:
        key = f"batch_{item['batch_size']}"
        if "error" in item:
            summary[key] = {"error": item["error"]}
            continue
        itl = item["itl_ms"]
        summary[key] = {
            "ttft_ms_p50": item["ttft_ms"]["p50"],
            "itl_ms_p50": itl["p50"] if itl else None,
            "output_tokens_per_s": item["output_tokens_per_s"],
            "spread": item["spread"],
        }
    return summary


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
