from pathlib import Path

import pytest
from pydantic import ValidationError

from trt_kd.reporting.model import Report

DOCS = Path(__file__).parents[2] / "docs" / "report.md"
ISSUE = {
    "": {"schema_version", "verdict", "variants", "gates"},
    "Variant": {"name", "role", "parameters", "size_bytes", "quality", "speed"},
    "Quality": {"kl_to_teacher_nats", "top1_agreement", "perplexity", "tasks"},
    "TaskScore": {"accuracy", "stderr", "n"},
    "SpeedRecord": {"backend", "format", "batch_size", "input_tokens", "output_tokens", "ttft_ms",
                    "itl_ms", "output_tokens_per_s", "repeats", "spread"},
    "Percentiles": {"p50", "p90", "p99"},
    "GateResult": {"name", "limit", "value", "verdict"},
}  # fmt: skip


def test_the_schema_holds_every_promised_field():
    schema = Report.model_json_schema()
    for name, fields in ISSUE.items():
        part = schema["$defs"][name] if name else schema
        assert fields <= set(part["properties"]), name


def test_every_field_of_the_schema_is_documented():
    schema, text = Report.model_json_schema(), DOCS.read_text(encoding="utf-8")
    for part in [schema, *schema["$defs"].values()]:
        for field, about in part["properties"].items():
            assert f"{field}`" in text, field
            assert " ".join(about["description"].split()) in text, field


def test_a_report_survives_its_json(make_report):
    report = make_report()
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_the_first_variant_must_be_the_baseline_and_roles_stand_once(make_report, variant):
    with pytest.raises(ValidationError, match="first variant must be the baseline"):
        make_report(variants=[variant("student"), variant("teacher")])
    with pytest.raises(ValidationError, match="stand twice"):
        make_report(variants=[variant("teacher"), variant("student"), variant("student")])
