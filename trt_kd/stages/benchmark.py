"""Benchmark: how fast each variant prefills and decodes, all of them in one interleaved run.

Every variant is loaded once, in a process of its own, and takes turns with the others in ABBA
order, so that drift of the machine meets all of them alike. Every run that counts decodes new rows
of real held-out text; variants with the same tokenizer get the same rows. Exactly ``output_tokens``
each. Or a load generator, a tool with a clock of its own, measures them.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from trt_kd.artifacts import Artifact, Finished, work_directory, work_key, writing
from trt_kd.artifacts.environment import environment
from trt_kd.artifacts.manifest import Metric
from trt_kd.backends import BACKENDS, LOAD_GENERATORS
from trt_kd.backends.base import Backend, lane_of
from trt_kd.backends.choosing import choose
from trt_kd.backends.interleaved import Samples, interleave, record, sample_lines
from trt_kd.backends.load import (
    LoadGenerator,
    Runs,
    Workplace,
    gpu_watch,
    load_record,
    rows_needed,
    sweep,
)
from trt_kd.backends.worker import Worker
from trt_kd.checkpoints import load_tokenizer
from trt_kd.config import StageConfig, build_plugin, plugin_field
from trt_kd.data.base import DataConfig, fingerprint, token_blocks, tokenizer_digest
from trt_kd.errors import ConfigError
from trt_kd.measuring.clock import Workload, measure_call
from trt_kd.measuring.gpu import GpuWatch, mark_unequal_throttling
from trt_kd.measuring.machine import affinity, load_average
from trt_kd.measuring.metrics import DEFINITIONS
from trt_kd.measuring.roofline import Peaks, decode_floor, measure_peaks, prefill_floor
from trt_kd.measuring.rounds import Rounds
from trt_kd.registry import Registry
from trt_kd.reporting.drawing import file_name, standalone
from trt_kd.reporting.speed import timed
from trt_kd.reporting.speed_figures import benchmark_figures

if TYPE_CHECKING:
    import numpy as np

SCHEMA_VERSION = 1
Records = dict[str, list[dict[str, Any]]]
"""One record per workload, by variant."""


def several(lengths: int | tuple[int, ...]) -> tuple[int, ...]:
    """All of ``lengths``, one or more."""
    return (lengths,) if isinstance(lengths, int) else lengths


def _stand_once(sizes: int | tuple[int, ...]) -> int | tuple[int, ...]:
    if len(set(several(sizes))) < len(several(sizes)):
        raise ValueError(f"one of {', '.join(map(str, several(sizes)))} stands twice")
    return sizes


BatchSizes = Annotated[tuple[PositiveInt, ...], Field(min_length=1), AfterValidator(_stand_once)]
"""One or more, each once."""
Sweep = Annotated[
    PositiveInt | Annotated[tuple[PositiveInt, ...], Field(min_length=1)],
    AfterValidator(_stand_once),
]
"""One length, or several, each once."""


class BenchmarkConfig(StageConfig):
    """Workloads, and how often each is measured."""

    stage: ClassVar[str] = "benchmark"

    data: DataConfig = DataConfig()
    """Text whose held-out split the prompts are cut from; its ``block_tokens`` has no say here."""
    batch_sizes: BatchSizes = (1, 4, 8)
    """Sequences decoded together; measured from the first to the last."""
    input_tokens: Sweep = 128
    """Prompt tokens of every sequence (ISL); a list is a sweep."""
    output_tokens: Sweep = 32
    """Tokens decoded for every sequence (OSL), end-of-text ignored; a list is a sweep."""
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
    backends: dict[str, plugin_field(BACKENDS, Backend)] = {}  # type: ignore[valid-type]
    """Runtime by the name of a variant, such as ``student: {kind: transformers, compile: true}``;
    of the others checkpoints run in transformers and exports in their lane."""
    load_generator: SerializeAsAny[LoadGenerator] | None = None
    """Tool that measures instead of our own clock, such as ``trtllm-bench``; ``batch_sizes`` are
    then the requests in flight at once."""

    @property
    def rounds(self) -> Rounds:
        """Every combination of lengths and batch size, and how often."""
        grid = product(several(self.input_tokens), several(self.output_tokens), self.batch_sizes)
        return Rounds(
            workloads=tuple(
                Workload(batch_size=size, input_tokens=before, output_tokens=after)
                for before, after, size in grid
            ),
            repeats=self.repeats,
            warmup=self.warmup,
        )

    @field_validator("load_generator", mode="before")
    @classmethod
    def _is_registered(cls, value: object) -> object:
        registry: Registry[Any] = LOAD_GENERATORS
        return None if value is None else build_plugin(registry, value)

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        names = ("warmup", "warmup_tolerance", "threads", "backends")
        fields = type(self).model_fields
        idle = [name for name in names if getattr(self, name) != fields[name].default]
        if self.load_generator is not None and idle:
            raise ValueError(f"{', '.join(idle)}: no effect beside load_generator")
        both = [name for name, each in self.backends.items() if each.threads is not None]
        if self.threads is not None and both:
            raise ValueError(f"backends.{both[0]}.threads: no effect beside threads")
        return self

    def outside(self) -> dict[str, str]:
        """Fingerprint of the text."""
        return self.data.outside()

    def rehearsal(self) -> Self:
        """One short run of the first batch size."""
        few = {"input_tokens": 16, "output_tokens": 4, "repeats": 1}
        if self.load_generator is None:
            few["warmup"] = 0
        return self.model_copy(update={"batch_sizes": self.batch_sizes[:1], **few})


@dataclass(frozen=True)
class Measured:
    """What a way of measuring found."""

    records: Records
    raw: Mapping[str, Sequence[dict[str, Any]]]
    """Lines of raw samples, by file name."""
    definitions: Mapping[str, str]
    seconds: float
    prompts_sha256: dict[str, str]
    peaks: dict[str, float] | None = None
    at_rates: Records = field(default_factory=dict)


def benchmark(config: BenchmarkConfig, *, out: Path, **variants: Artifact) -> Artifact:
    """Measure ``variants``, checkpoints and exports by name; write records and figures to ``out``.

    A workload that fails is recorded with its reason and the others are measured.

    Raises:
        ConfigError: if there is no variant.
        ArtifactError: if no backend runs a variant.
        DataError: if there is too little held-out text for prompts that never repeat.
        MissingDependencyError: if the load generator is not installed.
        TrtKdError: if a variant cannot be loaded, or fails at every workload.
    """
    return measured(config, variants, out, draw=True)


def measured(
    config: BenchmarkConfig, variants: Mapping[str, Artifact], out: Path, *, draw: bool = False
) -> Artifact:
    """See ``benchmark``; ``draw`` says whether there are figures."""
    if not variants:
        raise ConfigError("a benchmark needs at least one variant", hint="name a checkpoint")
    measure = _decoded if config.load_generator is None else _loaded
    with writing(out, kind="benchmark", config=config, inputs=variants) as draft:
        conditions = {"affinity": affinity(), "load_average_before": load_average()}
        found = measure(config, variants, out)
        result = {
            "schema_version": SCHEMA_VERSION,
            "hardware": environment(),
            "conditions": conditions | {"load_average_after": load_average()},
            "definitions": found.definitions,
            "peaks": found.peaks,
            "variants": found.records,
        }
        if config.load_generator is not None:
            tool = config.load_generator
            told = {"tool": tool.kind, "slo": dict(tool.limits())}
            result["load"] = told | {"served_here": tool.serves_here()}
        if found.at_rates:
            result["request_rates"] = found.at_rates
        _write_json(draft.path / "benchmark.json", result)
        if draw:
            for drawing in benchmark_figures(timed(result)):
                text = standalone(drawing)
                (draft.path / file_name(drawing)).write_text(text, encoding="utf-8")
        for name, lines in found.raw.items():
            text = "".join(f"{json.dumps(line)}\n" for line in lines)
            (draft.path / name).write_text(text, encoding="utf-8")
        rows = [item for records in found.records.values() for item in records]
        draft.metrics |= {
            "seconds": found.seconds,
            "steady": all(item.get("steady", True) for item in rows),
            "prompts_sha256": found.prompts_sha256,
            "variants": {name: _summary(records) for name, records in found.records.items()},
        }
    return Artifact.open(out, expect="benchmark")


def _prompts(
    config: BenchmarkConfig, folders: Mapping[str, Path], rows: int
) -> "dict[str, np.ndarray]":
    """Token ids ``[rows, longest prompt]`` by variant; the same where tokenizers are the same."""
    data = config.data.model_copy(update={"block_tokens": max(several(config.input_tokens))})
    cut: dict[str, np.ndarray] = {}
    prompts = {}
    for name, folder in folders.items():
        tokenizer = load_tokenizer(folder)
        digest = tokenizer_digest(tokenizer)
        if digest not in cut:
            cut[digest] = token_blocks(
                data, tokenizer, split="heldout", count=rows, seed=config.seed
            )
        prompts[name] = cut[digest]
    return prompts


def _decoded(config: BenchmarkConfig, variants: Mapping[str, Artifact], out: Path) -> Measured:
    """Measure variants that decode step by step, each in a process of its own."""
    backends = choose(config.backends, variants, config.threads)
    found: dict[tuple[str, Workload], Samples] = {}
    rounds, tolerance = config.rounds, config.warmup_tolerance
    prompts = _prompts(config, {n: each.path for n, each in variants.items()}, rounds.rows)
    peaks = measure_peaks(config.threads)
    finished = _finished(config, variants, out)
    with ExitStack() as stack:
        watch = stack.enter_context(GpuWatch())
        workers = {
            name: stack.enter_context(Worker(name, backends[name], artifact.path, watch))
            for name, artifact in variants.items()
        }
        seconds = measure_call(
            lambda: found.update(
                interleave(workers, prompts, rounds, tolerance=tolerance, finished=finished)
            )
        )
    limits = {"spread_limit": config.spread_limit, "tolerance": tolerance}
    records: Records = {
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
    mark_unequal_throttling(list(records.values()))
    return Measured(
        records=records,
        raw={"samples.jsonl": sample_lines(found)},
        definitions=DEFINITIONS,
        seconds=seconds,
        prompts_sha256={name: fingerprint(rows) for name, rows in prompts.items()},
        peaks=asdict(peaks),
    )


def _finished(config: BenchmarkConfig, variants: Mapping[str, Artifact], out: Path) -> Finished:
    """What was measured before a kill of the same work."""
    keys = {name: artifact.key for name, artifact in variants.items()}
    return Finished(work_directory(out), work_key(config, keys))


def _loaded(config: BenchmarkConfig, variants: Mapping[str, Artifact], out: Path) -> Measured:
    """Let a load generator measure the variants."""
    tool = config.load_generator
    if tool is None:
        raise ValueError("the settings name no load generator")
    targets = {name: artifact.path for name, artifact in variants.items()}
    loads = tool.loads(config.rounds.workloads)
    tool.check(targets, loads)
    folders = {name: tool.tokenizer_folder(target) for name, target in targets.items()}
    prompts = _prompts(config, folders, rows_needed(tool, loads, config.repeats))
    found: dict[str, list[Runs]] = {}
    folder = out.absolute().with_name(f"{out.name}.requests")
    with gpu_watch(tool) as watch:
        place = Workplace(folder, _finished(config, variants, out), watch)
        seconds = measure_call(
            lambda: found.update(
                sweep(tool, targets, prompts, loads, repeats=config.repeats, place=place)
            )
        )
    records: Records = {name: [] for name in variants}
    at_rates: Records = {name: [] for name in variants}
    lines = []
    for name, artifact in variants.items():
        for load, runs in zip(loads, found[name], strict=True):
            described = {"backend": tool.kind, "format": format_of(artifact)}
            described |= load.workload.model_dump()
            described |= load_record(runs, spread_limit=config.spread_limit)
            if load.request_rate is None:
                records[name].append(described)
            else:
                del described["batch_size"]
                at_rates[name].append(described | {"request_rate": load.request_rate})
            lines += [
                {"variant": name}
                | load.workload.model_dump()
                | {"request_rate": load.request_rate, "repeat": repeat}
                | {"times": run.times, "rates": run.rates, "report": run.report}
                | ({} if run.gpu is None else {"gpu": run.gpu})
                for repeat, run in enumerate(runs.runs)
            ]
    mark_unequal_throttling(list(records.values()))
    mark_unequal_throttling(list(at_rates.values()))
    return Measured(
        records=records,
        raw={"reports.jsonl": lines},
        definitions=DEFINITIONS | dict(tool.definitions),
        seconds=seconds,
        prompts_sha256={name: fingerprint(rows) for name, rows in prompts.items()},
        at_rates=at_rates if tool.request_rates else {},
    )


def format_of(artifact: Artifact) -> str:
    """Number format a variant is served in: its lane's precision, or transformers' default."""
    if artifact.manifest.kind == "checkpoint":
        return "bf16" if environment()["gpu"] else "fp32"
    lane = lane_of(artifact)
    return str(lane.get("precision", lane["kind"]))


def _floor(
    artifact: Artifact, backend: Backend, workload: Workload, peaks: Peaks
) -> dict[str, Metric]:
    """Least milliseconds of prefill and mean decoding step, and why; None where not known."""
    names = ("prefill_floor_ms", "prefill_bound", "decode_floor_ms", "decode_bound")
    work = backend.decode_work(artifact.path)
    if work is None:
        return dict.fromkeys(names)
    size, tokens = workload.batch_size, workload.input_tokens
    first = prefill_floor(work, peaks, batch_size=size, tokens=tokens)
    step = decode_floor(work, peaks, batch_size=size, tokens=tokens + workload.output_tokens / 2)
    return dict(zip(names, (first.ms, first.bound, step.ms, step.bound), strict=True))


def _summary(records: list[dict[str, Any]]) -> dict[str, Metric]:
    """Main numbers of one variant, by batch size, and by lengths where they differ."""
    summary: dict[str, Metric] = {}
    alike = len({(item["input_tokens"], item["output_tokens"]) for item in records}) == 1
    for item in records:
        lengths = "" if alike else f"_{item['input_tokens']}_{item['output_tokens']}"
        key = f"batch_{item['batch_size']}{lengths}"
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
