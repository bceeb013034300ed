"""What a report's own numbers say should be tried next."""

from collections.abc import Mapping
from typing import Any

from trt_kd.reporting.evidence import Evidence
from trt_kd.reporting.formatting import fixed, signed
from trt_kd.reporting.gates import Gate
from trt_kd.reporting.model import Report
from trt_kd.reporting.verdicts import decide

_LOSS = Gate(
    name="quantization of the student loses nothing",
    variant="student_quantized",
    relative_to="student",
    metric="top1_agreement",
    min=0.0,
)
"""Fails only where the whole 95 % interval of the difference is below zero."""


def proposals(report: Report, evidence: Evidence) -> list[str]:
    """Sentences for the notes: training in quantizers, where calibration alone surely loses.

    Only for a recipe that quantizes with Model Optimizer and does not train yet: other lanes
    quantize by themselves, and a loss that may be chance is not worth a training run.
    """
    quantize = _quantization(report.recipe)
    if quantize is None or quantize.get("train"):
        return []
    found = decide(_LOSS, report, evidence)
    if found.verdict != "fail" or found.value is None or found.interval is None:
        return []
    low, high = (signed(100 * end, 1) for end in found.interval)
    text = (
        f"Quantization takes {fixed(-100 * found.value, 1)} points of top-1 agreement from the "
        f"student (95 % interval {low} to {high}; {found.method}): that is not chance. Training in "
        "the quantizers may give some of it back: export.deploy.quantize.train={steps: 200}."
    )
    return [text]


def _quantization(recipe: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Settings of the quantization that ships, where Model Optimizer makes it."""
    deploy = (recipe.get("export") or {}).get("deploy") or {}
    found = deploy.get("quantize")
    return found if isinstance(found, Mapping) else None
