"""The training on the report: what the log says, what is missing, curves and alarms."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from trt_kd.reporting.collect import Sources
from trt_kd.reporting.markdown import report_markdown
from trt_kd.reporting.page import page
from trt_kd.reporting.training import POINTS, thinned, training_of
from trt_kd.reporting.training_figure import alarm_table, training_figure, training_sentence

STEPS = 30
ALARM = {"name": "response_rises", "step": 20, "says": "it climbs <b>", "advice": "less | more"}
METRICS = {"steps": STEPS, "tokens_trained": 7680, "monitor_s": 1.25, "alarms": []}


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


HISTORY = [
    {
        "step": n,
        "response_nats_per_token": 1 / n,
        "task_nats_per_token": 3.0,
        "feature_mse_0_1": 0.1,
    }
    for n in range(1, STEPS + 1)
]
MEASURED = [
    {"step": n, "heldout_kl_nats_per_token": 1 / (n + 1), "heldout_task_nats_per_token": 3.5,
     "heldout_entropy_nats_per_token": 3.0, "grad_norm_layer_0": 0.1, "monitor_seconds": 0.2}
    for n in (0, 10, 20, 30)
]  # fmt: skip


@pytest.fixture
def sources(tmp_path):
    """Inputs of a report whose student left these files and metrics."""

    def make(files=None, metrics=METRICS, stage="distill"):
        given = {"history.jsonl": lines(HISTORY), "monitors.jsonl": lines(MEASURED)}
        for name, text in (given if files is None else files).items():
            Path(tmp_path / name).write_text(text, encoding="utf-8")
        manifest = SimpleNamespace(stage=stage)
        student = SimpleNamespace(path=tmp_path, manifest=manifest, metrics=metrics)
        return Sources({"student": {"model": student}}, None, {})

    return make


def test_a_complete_log_is_read_whole(sources):
    training = training_of(sources())
    assert {curve.name: len(curve.steps) for curve in training.curves} == {
        "task": STEPS, "response": STEPS, "feature mse 0 1": STEPS, "task, held-out": 4,
        "KL to the teacher, held-out": 4, "entropy, held-out": 4,
    }  # fmt: skip
    assert (training.steps, training.tokens, training.missing) == (STEPS, 7680, [])


def test_a_student_that_was_not_trained_has_no_section(sources, make_report):
    assert training_of(sources(stage="prune")) is None
    assert training_of(Sources({}, None, {})) is None
    bare = make_report()
    assert "Training" not in page(bare).replace("Training tokens", "")
    assert "## Training" not in report_markdown(bare)


@pytest.mark.parametrize("text", [None, "no json\n", '{"step": "x"}\n', "[1]\n"])
@pytest.mark.parametrize("name", ["history.jsonl", "monitors.jsonl"])
def test_a_file_that_is_absent_or_damaged_is_left_out_and_named(sources, name, text):
    files = {"history.jsonl": lines(HISTORY), "monitors.jsonl": lines(MEASURED)}
    del files[name]
    training = training_of(sources(files | ({} if text is None else {name: text})))
    (sentence,) = training.missing
    assert name in sentence
    assert training.curves


@pytest.mark.parametrize("recorded", [None, "alarm", [{"name": "x"}]])
def test_alarms_that_cannot_be_read_are_not_taken_for_none(sources, recorded):
    training = training_of(sources(metrics=METRICS | {"alarms": recorded}))
    assert "Alarms are left out" in training.missing[0]
    assert "raised" not in training_sentence(training)


@pytest.mark.parametrize("count", [1, 2, POINTS, POINTS + 1, 7 * POINTS + 3])
def test_a_long_curve_keeps_its_ends_and_its_mean(count):
    points = [(n, float(n % 7)) for n in range(count)]
    kept = thinned(points)
    assert len(kept) == min(count, POINTS)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})
    mean = sum(value for _, value in points) / count
    assert sum(value for _, value in kept) / len(kept) == pytest.approx(mean, abs=0.1)


def test_alarms_stand_on_the_page_in_the_figure_and_in_markdown(sources, make_report):
    training = training_of(sources(metrics=METRICS | {"alarms": [ALARM]}))
    report = make_report(training=training)
    html, text = page(report), report_markdown(report)
    for shown in (html, text):
        assert "response_rises" in shown.replace("\\", "")
        assert "1 alarm was raised." in shown
        assert "<b>" not in shown.split("Training", 1)[1].split("Environment")[0]
    assert [row.name for row in alarm_table(training).rows] == ["1. response_rises"]


def test_the_figure_is_themed_well_formed_and_tells_curves_apart_without_colour(sources):
    drawing = training_figure(training_of(sources(metrics=METRICS | {"alarms": [ALARM]})))
    ElementTree.fromstring(drawing.svg)
    dashes = set(re.findall(r"stroke-dasharray: ([\d., ]+)", drawing.svg))
    assert len(dashes) >= 5
    assert "currentColor" in drawing.svg
    assert "KL to the teacher, held-out" in drawing.svg


def test_without_a_curve_there_is_no_figure(sources):
    assert training_figure(training_of(sources({}))) is None
