"""A report made by hand, with the evidence behind it; no artifact and no torch."""

import random
from typing import Any

import pytest

from trt_kd.reporting.evidence import Evidence, TimedRun
from trt_kd.reporting.model import Report, Variant

KL = {"teacher": 0.0, "teacher_quantized": 0.2, "pruned": 0.33, "cross_entropy": 0.6,
      "student": 0.26, "student_quantized": 0.4}  # fmt: skip
STEP_MS = {"teacher": 20.0, "teacher_quantized": 5.0, "student": 16.0, "student_quantized": 4.0}


def speed(step_ms: float, batch_size: int, **changes: Any) -> dict[str, Any]:
    times = {"p50": step_ms, "p90": 1.1 * step_ms, "p99": 1.3 * step_ms}
    return {
        "backend": "ort-genai", "format": "fp32", "batch_size": batch_size, "input_tokens": 128,
        "output_tokens": 32, "ttft_ms": {k: 5 * v for k, v in times.items()}, "itl_ms": times,
        "output_tokens_per_s": 1e3 * batch_size / step_ms, "repeats": 5, "spread": 0.02, **changes,
    }  # fmt: skip


def make_variant(role: str, **changes: Any) -> Variant:
    small = role not in ("teacher", "teacher_quantized", "corrected")
    kl = KL.get(role, 0.05)
    quality = {
        "kl_to_teacher_nats": kl, "kl_to_teacher_nats_stderr": 0.02 * kl,
        "top1_agreement": 1 - kl, "top1_agreement_stderr": 0.01 * (kl > 0),
        "perplexity": 26 + 10 * kl, "loss_nats_per_token": 3.2, "loss_nats_per_token_stderr": 0.03,
        "heldout_tokens": 8160,
        "tasks": {"facts": {"accuracy": 0.6 - kl / 5, "stderr": 0.035, "n": 200}},
    }  # fmt: skip
    timed = role in STEP_MS
    fields = {
        "name": role.replace("_", " "),
        "role": role,
        "parameters": 108_000_000 if small else 134_500_000,
        "parameters_share": 108 / 134.5 if small else 1.0,
        "size_bytes": 130_000_000 if "quantized" in role else 538_000_000,
        "format": "int4" if "quantized" in role else "fp32",
        "lane": "ort-genai" if timed else "checkpoint",
        "quality": quality,
        "evaluated": "checkpoint",
        "speed": [speed(STEP_MS[role], size) for size in (1, 8)] if timed else [],
        "same_speed_as": None if timed else "student",
        "artifacts": {"model": "ab" * 32},
    }
    return Variant.model_validate(fields | changes)


@pytest.fixture(name="speed")
def make_speed():
    """Make one record of speed; keyword arguments replace its fields."""
    return speed


@pytest.fixture
def variant():
    """Make one variant; keyword arguments replace its fields."""
    return make_variant


@pytest.fixture
def make_report():
    """Make a report of the six roles; keyword arguments replace its fields."""

    def make(**changes: Any) -> Report:
        fields: dict[str, Any] = {
            "name": "quickstart",
            "title": "A small model",
            "created": "2026-01-12T10:00:00+00:00",
            "verdict": "undecided",
            "baseline": "teacher",
            "variants": [make_variant(role) for role in KL],
            "environment": {"processor": "Example CPU", "cores": 2, "memory_bytes": 25e9},
        }
        return Report.model_validate(fields | changes)

    return make


@pytest.fixture
def evidence() -> Evidence:
    """Blocks, items and runs that agree with the report's numbers."""
    source = random.Random(0)
    noise = [source.uniform(-1, 1) for _ in range(32)]
    items = [source.random() for _ in range(200)]
    blocks, answers, runs = {}, {}, {}
    for role, kl in KL.items():
        blocks[role] = {"kl_to_teacher_nats": [kl * (1 + 0.1 * x) for x in noise]}
        answers[role] = {"facts": {str(n): x < 0.6 - kl / 5 for n, x in enumerate(items)}}
    for role, step in STEP_MS.items():
        runs[role] = {
            1: [TimedRun(1, (5 * step / 1e3, *[step * source.uniform(0.98, 1.02) / 1e3] * 31))
                for _ in range(5)]
        }  # fmt: skip
    return Evidence(items=answers, blocks=blocks, text=dict.fromkeys(KL, "ab"), runs=runs)
