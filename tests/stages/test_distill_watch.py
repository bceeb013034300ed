"""Weights, monitors and alarms of a whole distillation of a tiny model."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from trt_kd.artifacts import work_directory
from trt_kd.checkpoints import load_model, load_tokenizer
from trt_kd.data.base import token_blocks
from trt_kd.errors import DataError, TrtKdError
from trt_kd.evaluation.fidelity import block_scores
from trt_kd.stages.distill import DistillConfig, distill
from trt_kd.training import alarms
from trt_kd.training.alarms import ALARMS

STEPS, BLOCKS, SKIP = 8, 3, 2
MONITOR = {"every_steps": 3, "blocks": BLOCKS, "skip_blocks": SKIP}


@pytest.fixture(scope="module")
def student(make_student):
    return make_student()


@pytest.fixture(scope="module")
def settings(make_settings):
    """Settings of a short run whose weights move."""
    return make_settings(
        steps=STEPS,
        checkpoint_every_steps=4,
        task_weight={"kind": "linear", "end": 0.5, "steps": 6},
        response_weight={"kind": "cosine", "start": 1.0, "end": 0.5},
        monitor=MONITOR,
    )


@pytest.fixture(scope="module")
def watched(settings, student, teacher, tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("watched") / "out"
    return distill(settings(), student=student, teacher=teacher, out=out)


# --- weights ------------------------------------------------------------------------------------


def test_every_step_logs_its_weights_and_the_sum_that_they_make(watched, settings, log_of):
    config = settings()
    for row in log_of(watched):
        step = row["step"] - 1
        task, response = config.task_weight.at(step, STEPS), config.response_weight.at(step, STEPS)
        assert row["response_weight"] == response
        assert row.get("task_weight", 0.0) == task
        total = task * row.get("task_nats_per_token", 0.0)
        total += response * row["response_nats_per_token"]
        assert row["loss_nats_per_token"] == pytest.approx(total, rel=1e-6)


def test_a_term_of_weight_zero_is_not_computed_at_that_step(watched, log_of):
    first, second, *_ = log_of(watched)
    assert "task_nats_per_token" not in first
    assert second["task_nats_per_token"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_weight": 0, "response_weight": {"kind": "linear", "end": 1}}, "both 0 at step 1"),
        (
            {"task_weight": 0, "response_weight": {"kind": "cosine", "start": 1, "end": 0}},
            "both 0 at step 8",
        ),
        ({"task_weight": {"kind": "warmup", "end": 1, "steps": 9}}, "at most steps 8"),
        ({"stop_on": ["task_stals"]}, "task_stalls"),
        ({"stop_on": ["task_stalls"], "monitor": None}, "the run has no monitor"),
        ({"stop_on": ["feature_collapse"]}, "the run has no features"),
        (
            {"stop_on": ["response_rises"], "response_weight": 0, "task_weight": 1},
            "the run has no response",
        ),
        (
            {"allow_smaller_teacher": True, "response_weight": 0, "task_weight": 1},
            "allow_smaller_teacher has no effect",
        ),
        ({"monitor": {"every_steps": 0}}, "greater than 0"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(settings, changes, message):
    with pytest.raises(ValidationError, match=message):
        settings(**changes)


def test_a_rehearsal_keeps_schedules_and_measures_at_every_step(settings):
    config = settings(steps=500, stop_on=["response_rises"]).rehearsal()
    assert config == DistillConfig.model_validate(config.model_dump())
    assert config.task_weight.at(1, 2) == 0.5
    assert (config.monitor.every_steps, config.monitor.skip_blocks, config.stop_on) == (1, 0, [])


def test_the_control_stops_on_what_it_can_raise(settings):
    control = settings(stop_on=["task_stalls", "entropy_collapse"]).cross_entropy()
    assert control.stop_on == ["entropy_collapse"]
    assert control == DistillConfig.model_validate(
        control.model_dump() | {"stop_on": control.stop_on}
    )


# --- monitors -----------------------------------------------------------------------------------


def heldout(config, model):
    tokenizer = load_tokenizer(model.path)
    return token_blocks(config.data, tokenizer, split="heldout", count=BLOCKS, offset=SKIP)


def logits(model, blocks):
    with torch.no_grad():
        return load_model(model.path)(torch.from_numpy(np.array(blocks))).logits.numpy()


def test_it_measures_before_the_first_step_every_few_and_at_the_end(watched, log_of):
    assert [row["step"] for row in log_of(watched, "monitors")] == [0, 3, 6, 8]


@pytest.mark.parametrize("which", ["first", "last"])
def test_a_measurement_is_what_the_evaluation_finds(
    watched, settings, student, teacher, which, log_of
):
    row = log_of(watched, "monitors")[0 if which == "first" else -1]
    model = student if which == "first" else watched
    blocks = heldout(settings(), teacher)
    scores = block_scores(logits(model, blocks), logits(teacher, blocks), blocks)
    assert row["heldout_task_nats_per_token"] == pytest.approx(scores.loss_nats.mean(), rel=1e-4)
    assert row["heldout_kl_nats_per_token"] == pytest.approx(scores.kl_nats.mean(), rel=1e-3)
    assert row["heldout_top1_agreement"] == pytest.approx(scores.top1_agreement.mean(), abs=0.02)
    assert 0 < row["heldout_entropy_nats_per_token"] < np.log(512)


def test_gradient_norms_by_layer_make_up_that_of_the_step(watched, log_of):
    steps = {row["step"]: row for row in log_of(watched)}
    for row in log_of(watched, "monitors")[1:]:
        norms = [value for name, value in row.items() if name.startswith("grad_norm_")]
        assert len(norms) == 5
        total = sum(norm**2 for norm in norms) ** 0.5
        assert total == pytest.approx(steps[row["step"]]["grad_norm"], rel=1e-5)


def test_the_manifest_holds_the_last_measurement_the_first_and_their_time(watched, log_of):
    first, *_, last = log_of(watched, "monitors")
    for name in ("kl_nats_per_token", "top1_agreement", "task_nats_per_token"):
        assert watched.metrics[f"heldout_{name}"] == last[f"heldout_{name}"]
        assert watched.metrics[f"heldout_{name}_before"] == first[f"heldout_{name}"]
    assert watched.metrics["monitor_s"] == pytest.approx(
        sum(row["monitor_seconds"] for row in log_of(watched, "monitors", times=True))
    )
    assert watched.metrics["alarms"] == []


def test_tensorboard_has_every_measurement_once(watched):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(watched.path / "tensorboard"))
    events.Reload()
    values = events.Scalars("monitor/heldout_kl_nats_per_token")
    assert [value.step for value in values] == [0, 3, 6, 8]


def test_watching_changes_nothing_of_the_training(
    watched, settings, student, teacher, tmp_path, assert_same_weights
):
    config = settings(monitor=None)
    alone = distill(config, student=student, teacher=teacher, out=tmp_path / "out")
    assert_same_weights(alone, watched)
    assert not (alone.path / "monitors.jsonl").exists()


@pytest.fixture
def roles(student, teacher):
    return {"student": student, "teacher": teacher}


@pytest.mark.parametrize("draws", [0, 4])
def test_a_cached_teacher_is_measured_against_too(
    draws, watched, settings, roles, tmp_path, log_of
):
    config = settings(teacher={"kind": "cached", "k": 16, "draws": draws}, steps=2, task_weight=0.0)
    cached = distill(config, **roles, out=tmp_path / "out")
    found, dense = log_of(cached, "monitors")[0], log_of(watched, "monitors")[0]
    name = "heldout_task_nats_per_token"
    assert found[name] == pytest.approx(dense[name])
    name = "heldout_top1_agreement"  # stored log-probabilities are rounded: near ties may turn
    assert found[name] == pytest.approx(dense[name], abs=0.03)
    name = "heldout_kl_nats_per_token"
    if draws:
        assert found[name] == pytest.approx(dense[name], rel=0.05)
    else:
        assert 0 < found[name] < dense[name]


def test_without_a_teacher_there_is_nothing_to_agree_with(settings, student, tmp_path, log_of):
    config = settings(steps=2, task_weight=0.0).cross_entropy()
    control = distill(config, student=student, out=tmp_path / "out")
    names = {name for row in log_of(control, "monitors") for name in row if "heldout" in name}
    assert names == {"heldout_task_nats_per_token", "heldout_entropy_nats_per_token"}


def test_too_little_held_out_text_is_found_before_a_model_is_loaded(
    settings, student, teacher, tmp_path, monkeypatch
):
    monkeypatch.setattr("trt_kd.stages.distill.load_model", None)
    config = settings(monitor={"skip_blocks": 10**5})
    with pytest.raises(DataError, match=r"monitor: .* holds \d+ blocks") as raised:
        distill(config, student=student, teacher=teacher, out=tmp_path / "out")
    assert "monitor=null" in raised.value.hint


# --- alarms -------------------------------------------------------------------------------------


@pytest.fixture
def raised_at_five(monkeypatch):
    """The alarm response_rises is raised at step 5."""
    changed = tuple(
        replace(alarm, fires=lambda steps, measured: len(steps) == 5)
        if alarm.name == "response_rises"
        else alarm
        for alarm in ALARMS
    )
    monkeypatch.setattr(alarms, "ALARMS", changed)


@pytest.mark.usefixtures("raised_at_five")
def test_an_alarm_is_said_once_and_stands_in_the_manifest(
    watched, settings, roles, tmp_path, caplog, assert_same_weights
):
    with caplog.at_level(logging.WARNING, "trt_kd"):
        made = distill(settings(), **roles, out=tmp_path / "out")
    said = [record.getMessage() for record in caplog.records if "alarm" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("alarm response_rises at step 5: the response loss")
    (alarm,) = made.metrics["alarms"]
    assert (alarm["name"], alarm["step"]) == ("response_rises", 5)
    assert_same_weights(made, watched)


@pytest.mark.usefixtures("raised_at_five")
def test_a_stopped_run_keeps_its_checkpoint_and_goes_on_once_it_may(
    watched, settings, roles, tmp_path, assert_same_weights
):
    out = tmp_path / "out"
    stopping = settings(stop_on=["response_rises"])
    for _ in range(2):  # the second run stops at once: nothing has changed
        with pytest.raises(TrtKdError, match="step 5 by the alarm response_rises") as raised:
            distill(stopping, **roles, out=out)
        assert "take response_rises out of stop_on" in raised.value.hint
        assert not out.exists()
        checkpoints = (work_directory(out) / "checkpoints").iterdir()
        assert [path.name for path in checkpoints] == ["checkpoint-5"]
    assert_same_weights(distill(settings(), **roles, out=out), watched)


def test_what_stops_a_run_is_no_part_of_its_identity(settings):
    assert "stop_on" not in settings(stop_on=["response_rises"]).model_dump()
