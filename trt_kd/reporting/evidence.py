"""The single measurements behind a report, so that gates can compare like with like.

Two variants that answered the same items, or read the same blocks of text, are compared pair by
pair; two that were timed in the same rounds, round by round.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trt_kd.errors import ArtifactError
from trt_kd.reporting.model import Role

_AGAIN = "remove its folder and run the stage that wrote it again"


@dataclass(frozen=True)
class TimedRun:
    """Times of the steps of one run, in seconds; the first step includes prefill."""

    batch_size: int
    step_s: tuple[float, ...]
    input_tokens: int | None = None
    """Prompt tokens; None where it was not recorded."""

    def metric(self, name: str, percentile: str) -> float:
        """``ttft_ms``, ``itl_ms`` or ``output_tokens_per_s`` of this run alone.

        Raises:
            ValueError: if the run has no such number.
        """
        if name == "output_tokens_per_s":
            return self.batch_size * len(self.step_s) / sum(self.step_s)
        steps = self.step_s[:1] if name == "ttft_ms" else self.step_s[1:]
        if not steps:
            raise ValueError(f"a run of {len(self.step_s)} steps has no {name}")
        return 1e3 * float(np.percentile(steps, int(percentile[1:])))


@dataclass(frozen=True)
class Evidence:
    """Single results by role."""

    items: Mapping[Role, Mapping[str, Mapping[str, bool]]] = field(default_factory=dict)
    """Right or wrong, by role, task and item."""
    blocks: Mapping[Role, Mapping[str, list[float]]] = field(default_factory=dict)
    """Mean over each block of held-out text, by role and metric."""
    text: Mapping[Role, str] = field(default_factory=dict)
    """Fingerprint of the held-out text that was read, by role."""
    runs: Mapping[Role, Mapping[int, list[TimedRun]]] = field(default_factory=dict)
    """Timed runs in the order of the rounds, by role and batch size."""

    def paired_blocks(
        self, role: Role, other: Role, metric: str
    ) -> tuple[list[float], list[float]] | None:
        """Values of both variants on the same blocks, or None where they read different text."""
        first = self.blocks.get(role, {}).get(metric, [])
        second = self.blocks.get(other, {}).get(metric, [])
        same = self.text.get(role) is not None and self.text.get(role) == self.text.get(other)
        return (first, second) if same and len(first) == len(second) > 1 else None

    def paired_items(
        self, role: Role, other: Role, task: str
    ) -> tuple[list[int], list[int]] | None:
        """1 for right and 0 for wrong on the same items, or None where the items differ."""
        first = self.items.get(role, {}).get(task, {})
        second = self.items.get(other, {}).get(task, {})
        if len(first) < 2 or first.keys() != second.keys():
            return None
        names = sorted(first)
        return [int(first[name]) for name in names], [int(second[name]) for name in names]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object per line; an absent file has none.

    Raises:
        ArtifactError: if a line is damaged.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        rows = [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: {error}", hint=_AGAIN) from error
    if not all(isinstance(row, dict) for row in rows):
        raise ArtifactError(f"{path} is damaged: every line must be an object", hint=_AGAIN)
    return rows


def read_items(path: Path) -> dict[str, dict[str, bool]]:
    """Right or wrong by task and item, from an evaluation's ``items.jsonl``."""
    items: dict[str, dict[str, bool]] = {}
    for row in read_lines(path):
        items.setdefault(str(row["task"]), {})[str(row["item"])] = bool(row["correct"])
    return items


def read_blocks(path: Path) -> tuple[dict[str, list[float]], str]:
    """Means over blocks of held-out text by metric, and the text's fingerprint.

    Raises:
        ArtifactError: if the file is damaged.
    """
    if not path.is_file():
        return {}, ""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path} is not valid JSON: {error}", hint=_AGAIN) from error
    blocks = {
        name: [float(value) for value in values]
        for name, values in content.get("per_block", {}).items()
    }
    return blocks, str(content.get("heldout_blocks_sha256", ""))


def read_runs(path: Path) -> dict[str, dict[int, list[TimedRun]]]:
    """Timed runs by variant and batch size, in the order of the rounds."""
    runs: dict[str, dict[int, list[TimedRun]]] = {}
    for row in sorted(read_lines(path), key=lambda row: int(row["repeat"])):
        size = int(row["batch_size"])
        steps = tuple(float(step) for step in row["step_s"])
        run = TimedRun(size, steps, row.get("input_tokens"))
        runs.setdefault(str(row["variant"]), {}).setdefault(size, []).append(run)
    return runs
