"""A training in quantizers is proposed where the measured loss is no chance, and only there."""

from dataclasses import replace

import pytest

from trt_kd.reporting.proposals import proposals

RECIPE = {"export": {"deploy": {"quantize": {"format": "fp8", "train": None}}}}


def seen(evidence, change):
    """Evidence in which quantization changes the agreement of block ``n`` by ``change(n)``."""
    student = [0.7 + 0.001 * n for n in range(32)]
    quantized = [value + change(n) for n, value in enumerate(student)]
    blocks = {
        "student": {"top1_agreement": student},
        "student_quantized": {"top1_agreement": quantized},
    }
    return replace(evidence, blocks=blocks, text=dict.fromkeys(blocks, "ab"))


def test_a_loss_in_every_block_is_told_with_its_interval(make_report, evidence):
    (note,) = proposals(
        make_report(recipe=RECIPE), seen(evidence, lambda n: -0.02 - 0.001 * (n % 2))
    )
    assert "takes 2.0 points" in note or "takes 2.1 points" in note
    assert "32 paired blocks" in note
    assert "export.deploy.quantize.train=" in note


@pytest.mark.parametrize("change", [lambda n: 0.05 * (-1) ** n, lambda n: 0.01 + 0 * n])
def test_chance_and_gain_propose_nothing(make_report, evidence, change):
    assert proposals(make_report(recipe=RECIPE), seen(evidence, change)) == []


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"export": {"deploy": {"quantize": None}}},
        {"export": {"deploy": {"quantize": {"format": "fp8", "train": {"steps": 10}}}}},
    ],
)
def test_nothing_is_proposed_where_it_could_not_be_done_or_was(make_report, evidence, recipe):
    assert proposals(make_report(recipe=recipe), seen(evidence, lambda n: -0.02)) == []


def test_without_a_quantized_student_there_is_nothing_to_propose(make_report, evidence, variant):
    report = make_report(recipe=RECIPE, variants=[variant("teacher"), variant("student")])
    assert proposals(report, seen(evidence, lambda n: -0.02)) == []
