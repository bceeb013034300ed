"""What was logged, step by step, and the numbers that a manifest keeps of it."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

NAMES = {
    "step": "step",
    "loss": "loss_nats_per_token",
    "task_nats_per_token": "task_nats_per_token",
    "response_nats_per_token": "response_nats_per_token",
    "dropped_teacher_mass": "dropped_teacher_mass",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "seconds": "seconds",
}
"""Names here by names in the trainer's log."""
FINAL_STEPS = 10
"""Steps behind a final value."""


def history_of(log: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """One row per step from the trainer's log, which a resumed run carries on."""
    return [
        {ours: entry[theirs] for theirs, ours in NAMES.items() if theirs in entry}
        for entry in log
        if "loss" in entry
    ]


def final_losses(history: list[dict[str, float]]) -> dict[str, float]:
    """Mean of every loss over the last steps, in nats per token."""
    last = history[-FINAL_STEPS:]
    names = [name for name in last[-1] if name.endswith("_nats_per_token")]
    return {name: sum(row[name] for row in last) / len(last) for name in names}


def dropped_mass(history: list[dict[str, float]]) -> dict[str, float]:
    """Mean probability per token, over all steps, of tokens that only the teacher has.

    Empty where the vocabularies are of one size.
    """
    shares = [row["dropped_teacher_mass"] for row in history if "dropped_teacher_mass" in row]
    return {"dropped_teacher_mass": sum(shares) / len(shares)} if shares else {}


def write_history(history: list[dict[str, float]], path: Path) -> None:
    """Write one JSON object per step."""
    path.write_text("".join(json.dumps(row) + "\n" for row in history), encoding="utf-8")
