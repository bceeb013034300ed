"""What was logged, step by step and measurement by measurement, and what a manifest keeps of it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_kd.artifacts.manifest import Metric
from trt_kd.training.alarms import ALARMS, alarms_of

NAMES = {
    "step": "step",
    "loss": "loss_nats_per_token",
    "task_nats_per_token": "task_nats_per_token",
    "label_nats_per_token": "label_nats_per_token",
    "rationale_nats_per_token": "rationale_nats_per_token",
    "response_nats_per_token": "response_nats_per_token",
    "task_weight": "task_weight",
    "response_weight": "response_weight",
    "dropped_teacher_mass": "dropped_teacher_mass",
    "generated_tokens": "generated_tokens",
    "importance_weight": "importance_weight",
    "aligned_share": "aligned_share",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "seconds": "seconds",
}
"""Names here by names in the trainer's log."""
MEASURED = "monitor_seconds"
"""What stands in the log's entry of a measurement and in no other."""
MEASURED_PREFIXES = ("heldout_", "grad_norm_", MEASURED)
TERM_PREFIXES = ("feature_", "exit_", "balanced_")
FINAL_STEPS = 10
"""Steps behind a final value."""

Row = dict[str, float]


@dataclass(frozen=True)
class TrainingLog:
    """Both kinds of rows of a run, each in order."""

    steps: list[Row]
    """One per step."""
    measured: list[Row]
    """One per measurement; the first, of step 0, is of the untrained student."""


def log_of(entries: Iterable[Mapping[str, Any]]) -> TrainingLog:
    """Rows from the trainer's log, which a resumed run carries on."""
    found = list(entries)
    return TrainingLog(history_of(found), measured_of(found))


def history_of(log: Iterable[Mapping[str, Any]]) -> list[Row]:
    """One row per step."""
    return [
        {ours: entry[theirs] for theirs, ours in NAMES.items() if theirs in entry}
        | {name: value for name, value in entry.items() if name.startswith(TERM_PREFIXES)}
        for entry in log
        if "loss" in entry
    ]


def measured_of(log: Iterable[Mapping[str, Any]]) -> list[Row]:
    """One row per measurement of a monitor."""
    return [
        {"step": entry["step"]}
        | {name: value for name, value in entry.items() if name.startswith(MEASURED_PREFIXES)}
        for entry in log
        if MEASURED in entry
    ]


def training_metrics(log: TrainingLog, tokens: int) -> dict[str, Metric]:
    """What a manifest keeps of a run over ``tokens``, over all its sittings.

    Losses are means over the last ten steps, held-out values those of the last measurement and,
    before training, of the first; speed is that of training without its measurements.
    """
    seconds = sum(row["seconds"] for row in log.steps)
    raised = alarms_of(log.steps, log.measured)
    return {
        "steps": len(log.steps),
        "tokens_trained": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        **final_losses(log.steps),
        **dropped_mass(log.steps),
        **aligned_share(log.steps),
        **final_measurement(log.measured),
        "alarms": [
            {"name": a.name, "step": raised[a.name], "says": a.says, "advice": a.advice}
            for a in ALARMS
            if a.name in raised
        ],
    }


def final_losses(history: list[Row]) -> dict[str, float]:
    """Mean of every loss over those of the last steps that have it, per token."""
    last = history[-FINAL_STEPS:]
    names = dict.fromkeys(
        name
        for row in last
        for name in row
        if name.endswith("_nats_per_token") or name.startswith("feature_")
    )
    found = {name: [row[name] for row in last if name in row] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items()}


def final_measurement(measured: list[Row]) -> dict[str, float]:
    """Last measurement on held-out text, that of the untrained student, and the time of all."""
    if not measured:
        return {}
    names = [name for name in measured[-1] if name.startswith("heldout_")]
    before = measured[0] if measured[0]["step"] == 0 else {}
    return {
        **{name: measured[-1][name] for name in names},
        **{f"{name}_before": before[name] for name in names if name in before},
        "monitor_s": sum(row[MEASURED] for row in measured),
    }


def dropped_mass(history: list[Row]) -> dict[str, float]:
    """Mean probability per token, over all steps, of tokens that only the teacher has.

    Empty where the vocabularies are of one size.
    """
    shares = [row["dropped_teacher_mass"] for row in history if "dropped_teacher_mass" in row]
    return {"dropped_teacher_mass": sum(shares) / len(shares)} if shares else {}


def aligned_share(history: list[Row]) -> dict[str, float]:
    """Mean share, over all steps, of tokens at which a teacher with another tokenizer was heard.

    Empty where it has the student's.
    """
    shares = [row["aligned_share"] for row in history if "aligned_share" in row]
    return {"aligned_share": sum(shares) / len(shares)} if shares else {}


def write_rows(rows: list[Row], path: Path) -> None:
    """Write one JSON object per row."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
