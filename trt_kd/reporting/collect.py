"""From finished artifacts to the rows of the report and the evidence behind them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from trt_kd.architectures.shape import ModelShape, read_shape
from trt_kd.artifacts import Artifact
from trt_kd.checkpoints import read_json
from trt_kd.config import validate
from trt_kd.errors import ArtifactError
from trt_kd.reporting.evidence import Evidence, read_blocks, read_items, read_runs
from trt_kd.reporting.model import (
    ROLES,
    ExportRow,
    LineageNode,
    Quality,
    Role,
    TaskScore,
    Variant,
)
from trt_kd.reporting.speed import Timed, read_timed
from trt_kd.reporting.speed_model import SpeedRecord

UNQUANTIZED: tuple[Role, ...] = ("student", "teacher", "corrected", "pruned", "cross_entropy")
PARTS = ("model", "shipped", "evaluation")
LABELS: dict[Role, str] = {
    "teacher": "teacher",
    "teacher_quantized": "teacher, {format}",
    "corrected": "teacher, corrected",
    "pruned": "pruned, untrained",
    "cross_entropy": "trained on cross-entropy",
    "student": "student",
    "student_quantized": "student, {format}",
}


@dataclass(frozen=True)
class Sources:
    """The inputs of a report, sorted by what they are for."""

    roles: dict[Role, dict[str, Artifact]]
    benchmark: Artifact | None
    exports: dict[str, Artifact]
    loads: list[Artifact] = field(default_factory=list)
    """Further benchmarks, made by a load generator."""


def sort_inputs(inputs: Mapping[str, Artifact]) -> Sources:
    """Sort ``<role>.<part>``, ``benchmark``, ``export.<name>`` and ``load.<name>``.

    Raises:
        ArtifactError: if an input has another name or a role has no model.
    """
    roles: dict[Role, dict[str, Artifact]] = {}
    exports: dict[str, Artifact] = {}
    loads = []
    for name, artifact in inputs.items():
        head, _, tail = name.partition(".")
        if head == "export" and tail:
            exports[tail] = artifact
        elif head == "load" and tail:
            loads.append(artifact)
        elif head in ROLES and tail in PARTS:
            role = ROLES[ROLES.index(head)]
            roles.setdefault(role, {})[tail] = artifact
        elif name != "benchmark":
            raise ArtifactError(
                f"a report has no input {name!r}",
                hint=f"inputs are benchmark, load.NAME, export.NAME, and ROLE.model, "
                f"ROLE.shipped and ROLE.evaluation with ROLE one of {', '.join(get_args(Role))}",
            )
    for role, parts in roles.items():
        if "model" not in parts:
            raise ArtifactError(
                f"the report's input {role}.model is missing",
                hint=f"give the checkpoint behind {role}.{next(iter(parts))}",
            )
    return Sources(roles, inputs.get("benchmark"), exports, loads)


def variants(sources: Sources, *, baseline: Role, names: Mapping[Role, str]) -> list[Variant]:
    """Rows of the report, the baseline first.

    Raises:
        ArtifactError: if there is no baseline or an artifact is damaged.
    """
    if baseline not in sources.roles:
        raise ArtifactError(
            f"the report's baseline {baseline!r} has no model",
            hint=f"give {baseline}.model, or set baseline to one of: "
            + (", ".join(sources.roles) or "no role has a model"),
        )
    order = [baseline, *(role for role in ROLES if role != baseline and role in sources.roles)]
    speed = read_timed(sources.benchmark).speed
    loads = _loads(sources)
    shapes = {role: shape_of(parts["model"]) for role, parts in sources.roles.items()}
    counts = {role: _parameters(sources.roles[role]["model"]) for role in order}
    rows = []
    for role in order:
        parts = sources.roles[role]
        shipped = parts.get("shipped", parts["model"])
        weights = format_of(shipped)
        rows.append(
            Variant(
                name=names.get(role, LABELS[role].format(format=weights)),
                role=role,
                parameters=counts[role],
                parameters_share=counts[role] / counts[baseline],
                size_bytes=shipped.size_bytes,
                format=weights,
                lane=lane_of(shipped),
                quality=_quality(parts.get("evaluation")),
                evaluated=_evaluated(parts.get("evaluation")),
                speed=speed.get(role, []),
                same_speed_as=_twin(role, shapes, speed),
                load=[record for each in loads for record in each.load.get(role, [])],
                artifacts={part: artifact.key for part, artifact in parts.items()},
                seconds=_seconds(parts),
            )
        )
    return rows


def _loads(sources: Sources) -> list[Timed]:
    """Every benchmark that may have loads.

    Raises:
        ArtifactError: if one that was given as a load was not made by a load generator.
    """
    found = [read_timed(artifact) for artifact in sources.loads]
    for artifact, each in zip(sources.loads, found, strict=True):
        if not each.load:
            raise ArtifactError(
                f"{artifact.path} was not measured by a load generator",
                hint="give it as benchmark, or measure with load_generator",
            )
    return [read_timed(sources.benchmark), *found]


def evidence(sources: Sources) -> Evidence:
    """Single results of every evaluation and of the benchmark."""
    found = {
        role: parts["evaluation"].path
        for role, parts in sources.roles.items()
        if "evaluation" in parts
    }
    blocks = {role: read_blocks(path / "evaluation.json") for role, path in found.items()}
    runs = read_runs(sources.benchmark.path / "samples.jsonl") if sources.benchmark else {}
    return Evidence(
        items={role: read_items(path / "items.jsonl") for role, path in found.items()},
        blocks={role: values for role, (values, _) in blocks.items()},
        text={role: text for role, (_, text) in blocks.items() if text},
        runs={role: runs[role] for role in ROLES if role in runs},
    )


def export_rows(sources: Sources) -> list[ExportRow]:
    """Further exported artifacts, in the order they were given."""
    return [
        ExportRow(
            name=name,
            lane=lane_of(artifact),
            format=format_of(artifact),
            size_bytes=artifact.size_bytes,
            logits_kl_nats=_number(artifact, "logits_kl_nats"),
            top1_agreement=_number(artifact, "top1_agreement"),
            artifact=artifact.key,
        )
        for name, artifact in sources.exports.items()
    ]


def environment_of(sources: Sources) -> dict[str, Any]:
    """The machine that did the timing, or the first evaluation, or that made the baseline."""
    timed = next(iter(filter(None, [sources.benchmark, *sources.loads])), None)
    if timed is not None:
        hardware = read_json(timed.path / "benchmark.json").get("hardware")
        return dict(hardware or timed.manifest.environment)
    chosen = next(iter(sources.roles.values()))
    return dict(chosen.get("evaluation", chosen["model"]).manifest.environment)


def lineage(inputs: Mapping[str, Artifact]) -> list[LineageNode]:
    """Every artifact behind ``inputs``, each after its own inputs."""
    known: dict[str, tuple[str, str, str, dict[str, str]]] = {}
    for name, artifact in inputs.items():
        manifest = artifact.manifest
        for key, ancestor in manifest.lineage.items():
            known.setdefault(key, ("", ancestor.stage, ancestor.kind, ancestor.inputs))
        taken = known.get(manifest.key, ("",))[0]
        label = f"{taken}, {name}" if taken else name
        known[manifest.key] = (label, manifest.stage, manifest.kind, manifest.inputs)
    return [
        LineageNode(
            name=known[key][0] or known[key][1],
            stage=known[key][1],
            kind=known[key][2],
            key=key[:12],
            inputs={role: parent[:12] for role, parent in known[key][3].items()},
        )
        for key in _topological({key: list(entry[3].values()) for key, entry in known.items()})
    ]


def _topological(parents: Mapping[str, list[str]]) -> list[str]:
    order: dict[str, None] = {}

    def visit(key: str) -> None:
        if key in order or key not in parents:
            return
        for parent in parents[key]:
            visit(parent)
        order[key] = None

    for key in parents:
        visit(key)
    return list(order)


def lane_of(artifact: Artifact) -> str:
    """Registered name of the exporter that wrote ``artifact``; its kind if none did."""
    lane = artifact.manifest.config.get("lane")
    return str(lane["kind"]) if isinstance(lane, dict) and "kind" in lane else _kind(artifact)


def format_of(artifact: Artifact) -> str:
    """Format of the weights: the lane's precision, the quantization's, or the stored type."""
    manifest = artifact.manifest
    lane = manifest.config.get("lane")
    if isinstance(lane, dict) and lane.get("precision"):
        return str(lane["precision"])
    configs = [manifest.config]
    configs += [
        manifest.lineage[key].config for key in manifest.inputs.values() if key in manifest.lineage
    ]
    for config in configs:
        chosen = config.get("format")
        if chosen:
            return str(chosen["kind"] if isinstance(chosen, dict) else chosen)
    path = artifact.path / "config.json"
    config = read_json(path) if path.is_file() else {}
    return str(config.get("dtype") or config.get("torch_dtype") or _kind(artifact))


def _kind(artifact: Artifact) -> str:
    return str(artifact.manifest.kind)


def pruned_of(sources: Sources) -> Artifact | None:
    """What the prune stage wrote; the student stands for it where it was not trained."""
    pruned = sources.roles.get("pruned", {}).get("model")
    student = sources.roles.get("student", {}).get("model")
    if pruned is None and student is not None and student.manifest.stage == "prune":
        return student
    return pruned


def shape_of(model: Artifact) -> ModelShape | None:
    """Shape of a checkpoint, or None where it has no ``config.json``."""
    return read_shape(model.path) if (model.path / "config.json").is_file() else None


def _parameters(model: Artifact) -> int:
    recorded = model.metrics.get("parameters")
    return recorded if isinstance(recorded, int) else read_shape(model.path).parameters


def _twin(
    role: Role, shapes: Mapping[Role, ModelShape | None], speed: Mapping[str, list[SpeedRecord]]
) -> Role | None:
    """The measured unquantized variant of the same shapes, for one that was not measured."""
    if role in speed or role not in UNQUANTIZED or shapes.get(role) is None:
        return None
    same = (other for other in UNQUANTIZED if speed.get(other) and shapes.get(other))
    return next((other for other in same if shapes[other] == shapes[role]), None)


def _quality(evaluation: Artifact | None) -> Quality:
    if evaluation is None:
        return Quality()
    fields = {
        name: evaluation.metrics.get(name) for name in Quality.model_fields if name != "tasks"
    }
    found = evaluation.metrics.get("tasks")
    tasks = {
        name: validate(
            TaskScore,
            {key: score.get(key) for key in TaskScore.model_fields},
            where=f"{evaluation.path}: task {name}",
        )
        for name, score in (found.items() if isinstance(found, dict) else ())
    }
    return validate(Quality, {**fields, "tasks": tasks}, where=str(evaluation.path))


def _evaluated(evaluation: Artifact | None) -> Any:
    if evaluation is None:
        return None
    ancestor = evaluation.manifest.lineage.get(evaluation.manifest.inputs.get("model", ""))
    return "export" if ancestor is not None and ancestor.kind == "export" else "checkpoint"


def notes(sources: Sources) -> list[str]:
    """What a reader must know: workloads that failed, variants of no row, other machines."""
    timed = _loads(sources)
    names = dict.fromkeys(name for each in timed for name in each.speed)
    found = [
        f"The benchmark also timed {name}, which is no row of this report."
        for name in names
        if name not in sources.roles
    ]
    found += [sentence for each in timed for sentence in each.failures]
    machines = {
        str(parts["evaluation"].manifest.environment.get("processor"))
        for parts in sources.roles.values()
        if "evaluation" in parts
    }
    if len(machines) > 1:
        found.append(f"Quality was measured on different machines: {', '.join(sorted(machines))}.")
    return found


def _seconds(parts: Mapping[str, Artifact]) -> dict[str, float]:
    found = {part: _number(artifact, "seconds") for part, artifact in parts.items()}
    return {part: value for part, value in found.items() if value is not None}


def _number(artifact: Artifact, name: str) -> float | None:
    value = artifact.metrics.get(name)
    return float(value) if isinstance(value, int | float) else None
