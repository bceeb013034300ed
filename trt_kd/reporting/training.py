"""How the student was trained: the log that the distill stage leaves in its artifact.

What is absent or damaged is left out and named, so that older and newer logs still make a page.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from trt_kd.artifacts import Artifact
from trt_kd.reporting.collect import Sources
from trt_kd.reporting.training_model import Curve, RaisedAlarm, Training

POINTS = 200
"""Points of a curve at most: what a figure of this width can show."""
STEP_CURVES = {
    "task_nats_per_token": "task",
    "label_nats_per_token": "answers",
    "rationale_nats_per_token": "rationales",
    "response_nats_per_token": "response",
}
HELDOUT_CURVES = {
    "heldout_task_nats_per_token": "task, held-out",
    "heldout_kl_nats_per_token": "KL to the teacher, held-out",
    "heldout_entropy_nats_per_token": "entropy, held-out",
}


def training_of(sources: Sources) -> Training | None:
    """How the student was trained, or None where it was not."""
    student = sources.roles.get("student", {}).get("model")
    if student is None or student.manifest.stage != "distill":
        return None
    missing: list[str] = []
    steps = _rows(student, "history.jsonl", "losses by step", missing)
    measured = _rows(student, "monitors.jsonl", "measurements on held-out text", missing)
    curves = [
        *_curves(steps, STEP_CURVES),
        *_curves(steps, {n: _feature(n) for row in steps[:1] for n in row if _is_feature(n)}),
        *_curves(measured, HELDOUT_CURVES),
    ]
    return Training(
        steps=_number(student, "steps"),
        tokens=_number(student, "tokens_trained"),
        monitor_s=student.metrics.get("monitor_s"),
        curves=curves,
        alarms=_alarms(student, missing),
        missing=missing,
    )


def _rows(
    student: Artifact, name: str, what: str, missing: list[str]
) -> Sequence[Mapping[str, float]]:
    path = student.path / name
    if not path.is_file():
        missing.append(f"The {what} are left out: there is no {name}.")
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return TypeAdapter(list[dict[str, float]]).validate_python(rows)
    except (OSError, ValueError):
        missing.append(f"The {what} are left out: {name} is damaged.")
        return []


def _curves(rows: Sequence[Mapping[str, float]], names: Mapping[str, str]) -> list[Curve]:
    found = []
    for name, label in names.items():
        points = [(int(row["step"]), row[name]) for row in rows if name in row]
        if points:
            kept = thinned(points)
            found.append(Curve(name=label, steps=[s for s, _ in kept], values=[v for _, v in kept]))
    return found


def thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most ``POINTS`` of the points, both ends among them: means of neighbours in between."""
    if len(points) <= POINTS:
        return list(points)
    inner, count = points[1:-1], POINTS - 2
    kept = [points[0]]
    for number in range(count):
        part = inner[number * len(inner) // count : (number + 1) * len(inner) // count]
        kept.append((part[len(part) // 2][0], sum(value for _, value in part) / len(part)))
    return [*kept, points[-1]]


def _is_feature(name: str) -> bool:
    return name.startswith("feature_")


def _feature(name: str) -> str:
    return name.removesuffix("_nats_per_token").replace("_", " ")


def _number(student: Artifact, name: str) -> int | None:
    value = student.metrics.get(name)
    return value if isinstance(value, int) else None


def _alarms(student: Artifact, missing: list[str]) -> list[RaisedAlarm]:
    recorded: Any = student.metrics.get("alarms")
    if recorded is None:
        missing.append("Alarms are left out: none were recorded.")
        return []
    try:
        return TypeAdapter(list[RaisedAlarm]).validate_python(recorded)
    except ValidationError:
        missing.append("Alarms are left out: their record is damaged.")
        return []
