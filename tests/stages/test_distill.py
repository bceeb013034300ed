"""The distillation stage on tiny models: what it learns, what it refuses, how it survives."""

import json
import signal
import sys
from importlib import import_module
from operator import attrgetter

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.nn import functional as F

from trt_kd.artifacts import work_directory
from trt_kd.checkpoints import load_model, load_tokenizer, stored_dtype
from trt_kd.data.base import token_blocks
from trt_kd.errors import ConfigError, DataError, ModelError, TrtKdError
from trt_kd.losses.jsd import JensenShannon
from trt_kd.losses.kl import ForwardKL
from trt_kd.stages.distill import DistillConfig, distill, require_modelopt
from trt_kd.teachers.online import OnlineTeacher

STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def modelopt():
    require_modelopt()


@pytest.fixture(scope="module")
def student(make_student):
    return make_student()


@pytest.fixture(scope="module")
def settings(text_file):
    """Settings of a short float32 run; keyword arguments replace them."""

    def make(**changes):
        source = {"kind": "text", "files": [str(text_file)]}
        plain = {
            "data": {"source": source, "block_tokens": 32},
            "steps": STEPS,
            "batch_size": 2,
            "learning_rate": 1e-3,
            "checkpoint_every_steps": 2,
            "precision": "fp32",
        }
        return DistillConfig.model_validate(plain | changes)

    return make


@pytest.fixture(scope="module")
def run_on_both_terms(settings, student, teacher):
    def run(out):
        return distill(settings(task_weight=0.5), student=student, teacher=teacher, out=out)

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory, run_on_both_terms):
    """A run that nothing interrupted."""
    return run_on_both_terms(tmp_path_factory.mktemp("whole") / "out")


def weights(artifact):
    return load_file(artifact.path / "model.safetensors")


def history(artifact):
    lines = (artifact.path / "history.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def losses(artifact):
    measured = (artifact.path / "monitors.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [*history(artifact), *map(json.loads, measured)]
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows]


def first_batch(config, student):
    tokenizer = load_tokenizer(student.path)
    blocks = token_blocks(config.data, tokenizer, split="train", count=config.batch_size)
    return torch.from_numpy(np.array(blocks))


def assert_same_run(one, other):
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)
    assert losses(one) == losses(other)
    for name in ("loss_nats_per_token", "task_nats_per_token", "response_nats_per_token"):
        assert one.metrics[name] == other.metrics[name]


# --- what it learns -----------------------------------------------------------------------------


def heldout_kl(config, teacher, model):
    tokenizer = load_tokenizer(teacher.path)
    blocks = token_blocks(config.data, tokenizer, split="heldout", count=16)
    tokens = torch.from_numpy(np.array(blocks))
    with torch.no_grad():
        p = load_model(teacher.path)(tokens).logits.log_softmax(-1)
        q = load_model(model.path)(tokens).logits.log_softmax(-1)
    return F.kl_div(q, p, reduction="sum", log_target=True).item() / tokens.numel()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_distillation_brings_the_student_closer_to_the_teacher_on_held_out_text(
    settings, student, teacher, tmp_path, precision
):
    config = settings(steps=20, batch_size=4, precision=precision, checkpoint_every_steps=20)
    trained = distill(config, student=student, teacher=teacher, out=tmp_path / "out")
    before, after = (heldout_kl(config, teacher, model) for model in (student, trained))
    assert after < 0.6 * before


def test_the_first_step_logs_the_losses_of_the_untrained_student(whole, settings, student, teacher):
    tokens = first_batch(settings(), student)
    with torch.no_grad():
        student_logits = load_model(student.path)(tokens).logits[:, :-1].flatten(0, 1)
        teacher_logits = load_model(teacher.path)(tokens).logits[:, :-1].flatten(0, 1)
    task = F.cross_entropy(student_logits, tokens[:, 1:].flatten()).item()
    log_q, log_p = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    response = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True).item()
    first = history(whole)[0]
    assert first["task_nats_per_token"] == pytest.approx(task, rel=1e-5)
    assert first["response_nats_per_token"] == pytest.approx(response, rel=1e-4)
    assert first["loss_nats_per_token"] == pytest.approx(0.5 * task + response, rel=1e-5)


def test_the_first_update_is_that_of_plain_autograd_and_adamw(settings, student, teacher, tmp_path):
    config = settings(steps=1, task_weight=0.5, loss="jsd", weight_decay=0.1)
    trained = distill(config, student=student, teacher=teacher, out=tmp_path / "out")

    tokens = first_batch(config, student)
    model, frozen = load_model(student.path), load_model(teacher.path)
    logits = model(tokens).logits[:, :-1].flatten(0, 1)
    with torch.no_grad():
        targets = frozen(tokens).logits[:, :-1].flatten(0, 1)
    everything = torch.ones(len(logits), dtype=torch.bool)
    loss = 0.5 * F.cross_entropy(logits, tokens[:, 1:].flatten())
    loss = loss + JensenShannon()(logits, targets, everything) / len(logits)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    matrices = [p for name, p in model.named_parameters() if "norm" not in name]
    groups = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1).step()

    expected = model.state_dict()
    for name, value in weights(trained).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4)


def test_accumulated_passes_make_the_step_of_one_larger_pass(
    whole, settings, student, teacher, tmp_path
):
    config = settings(task_weight=0.5, batch_size=1, gradient_accumulation=2)
    trained = distill(config, student=student, teacher=teacher, out=tmp_path / "out")
    torch.testing.assert_close(weights(trained), weights(whole), rtol=1e-3, atol=1e-5)
    assert trained.metrics["tokens_trained"] == whole.metrics["tokens_trained"]
    assert trained.metrics["data_fingerprint"] == whole.metrics["data_fingerprint"]


def test_the_cross_entropy_control_runs_without_a_teacher_on_the_same_tokens(
    whole, settings, student, tmp_path, monkeypatch
):
    monkeypatch.setattr(OnlineTeacher, "load", None)
    control = distill(settings().cross_entropy(), student=student, out=tmp_path / "out")
    assert control.metrics["data_fingerprint"] == whole.metrics["data_fingerprint"]
    assert "response_nats_per_token" not in control.metrics
    assert control.metrics["task_nats_per_token"] == control.metrics["loss_nats_per_token"]
    assert history(control)[0]["task_nats_per_token"] == history(whole)[0]["task_nats_per_token"]


def test_the_control_does_not_depend_on_options_without_effect(settings):
    plain = settings().cross_entropy()
    assert settings(loss="jsd", task_weight=0.2, label_smoothing=0.1).cross_entropy() == plain
    assert (plain.task_weight, plain.response_weight) == (1.0, 0.0)


# --- what it writes -----------------------------------------------------------------------------


def test_the_manifest_says_what_the_training_came_to(whole):
    metrics, rows = whole.metrics, history(whole)
    assert metrics["steps"] == STEPS
    assert metrics["tokens_trained"] == STEPS * 2 * 32
    assert metrics["trainable_parameters"] == metrics["parameters"]
    assert metrics["tokens_per_s"] == pytest.approx(metrics["tokens_trained"] / metrics["seconds"])
    for name in ("loss_nats_per_token", "task_nats_per_token", "response_nats_per_token"):
        assert metrics[name] == pytest.approx(sum(row[name] for row in rows) / STEPS)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert {"grad_norm", "learning_rate"} <= rows[0].keys()
    whole.verify()


def test_only_the_weights_of_the_student_change(whole, student):
    def config(artifact):
        return json.loads((artifact.path / "config.json").read_text(encoding="utf-8"))

    assert config(whole) == config(student)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (whole.path / name).read_bytes() == (student.path / name).read_bytes()
    assert weights(whole).keys() == weights(student).keys()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_student_keeps_its_dtype(
    make_student, make_model, settings, teacher, tmp_path, precision
):
    half = make_student(dtype=torch.bfloat16)
    config = settings(steps=1, precision=precision)
    trained = distill(config, student=half, teacher=half, out=tmp_path / "out")
    assert {value.dtype for value in weights(trained).values()} == {torch.bfloat16}
    assert stored_dtype(trained.path) == "bfloat16"


def test_tensorboard_has_every_step_once_and_no_name_of_the_machine(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = [name for name in whole.manifest.files if name.startswith("tensorboard/")]
    assert files == ["tensorboard/events.out.tfevents.0"]
    events = EventAccumulator(str(whole.path / "tensorboard"))
    events.Reload()
    for name in ("task_nats_per_token", "response_nats_per_token", "grad_norm", "learning_rate"):
        values = events.Scalars(f"train/{name}")
        assert [value.step for value in values] == list(range(1, STEPS + 1))
        assert [value.value for value in values] == pytest.approx(
            [row[name] for row in history(whole)]
        )


def test_nothing_is_printed(settings, student, teacher, tmp_path, capsys):
    distill(settings(steps=1), student=student, teacher=teacher, out=tmp_path / "out")
    assert capsys.readouterr().out == ""


# --- how it survives ----------------------------------------------------------------------------


def test_two_runs_of_the_same_settings_end_with_the_same_weights(
    whole, settings, student, teacher, tmp_path
):
    config = settings(task_weight=0.5)
    assert_same_run(distill(config, student=student, teacher=teacher, out=tmp_path / "o"), whole)


CUTS = {
    "in the first step": ("callbacks.Progress.on_log", 1, None),
    "between two saves": ("callbacks.Progress.on_log", 5, "checkpoint-4"),
    "in the middle of a save": ("callbacks.mark_complete", 4, "checkpoint-2"),
    "right after a save": ("callbacks.remove_older", 4, "checkpoint-4"),
    "at the end of training": ("callbacks.EventFiles.close", STEPS, f"checkpoint-{STEPS}"),
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
def test_a_run_cut_off_anywhere_ends_as_if_it_had_not_been(
    whole, run_on_both_terms, tmp_path, monkeypatch, cut
):
    function, step, resumes_from = cut
    checkpoints = work_directory(tmp_path / "out") / "checkpoints"
    from trt_kd.training import callbacks, loop

    def call(*arguments, **keywords):
        if steps[-1] == step:
            raise KeyboardInterrupt
        return original(*arguments, **keywords)

    steps = [0]
    monkeypatch.setattr(
        callbacks.MarkCheckpoints,
        "on_step_begin",
        lambda *arguments, **_: steps.append(arguments[2].global_step + 1),
    )
    original = attrgetter(function)(import_module("trt_kd.training"))
    with monkeypatch.context() as patch:
        patch.setattr(f"trt_kd.training.{function}", call)
        with pytest.raises(KeyboardInterrupt):
            run_on_both_terms(tmp_path / "out")
    assert not (tmp_path / "out").exists()

    found = []
    look = loop.newest_complete
    monkeypatch.setattr(loop, "newest_complete", lambda path: found.append(look(path)) or found[0])
    assert_same_run(run_on_both_terms(tmp_path / "out"), whole)
    assert (found[0] and found[0].name) == resumes_from
    assert not checkpoints.parent.exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from trt_kd.artifacts import Artifact
from trt_kd.stages.distill import DistillConfig, distill, require_modelopt

config, student, teacher, out = sys.argv[1:]
require_modelopt()
from trt_kd.training import callbacks

def killed(self, args, state, control, logs=None, **_):
    if state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

callbacks.Progress.on_log = killed
roles = {"student": Artifact.open(Path(student)), "teacher": Artifact.open(Path(teacher))}
distill(DistillConfig.model_validate_json(config), **roles, out=Path(out))
"""


@pytest.mark.slow
def test_a_killed_process_is_resumed_to_the_same_end(
    whole, settings, student, teacher, forks, tmp_path
):
    config, out = settings(task_weight=0.5), tmp_path / "out"
    arguments = [config.model_dump_json(), str(student.path), str(teacher.path), str(out)]
    done = forks.run([sys.executable, "-c", KILLED, *arguments])
    assert done.returncode == -signal.SIGKILL, done.stderr
    checkpoints = work_directory(out) / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-4"]
    assert_same_run(distill(config, student=student, teacher=teacher, out=out), whole)


def test_checkpoints_of_other_settings_are_not_taken_up(
    whole, settings, student, teacher, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("trt_kd.stages.distill.save_model", None)
        with pytest.raises(TypeError):
            distill(settings(learning_rate=0.01), student=student, teacher=teacher, out=out)
    config = settings(task_weight=0.5)
    assert_same_run(distill(config, student=student, teacher=teacher, out=out), whole)


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_checkpoints(
    settings, student, teacher, tmp_path
):
    out = tmp_path / "out"
    config = settings(learning_rate=1e30, checkpoint_every_steps=1)
    with pytest.raises(TrtKdError, match=r"diverged at step 2: .* is nan") as raised:
        distill(config, student=student, teacher=teacher, out=out)
    assert "smaller learning_rate" in raised.value.hint
    assert not out.exists()
    checkpoints = work_directory(out) / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-1"]


# --- what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"response_weight": 0}, "both 0"),
        ({"label_smoothing": 0.1}, "label_smoothing has no effect"),
        ({"warmup_steps": STEPS}, "warmup_steps 6 must be below steps 6"),
        ({"precision": "fp16"}, "bf16"),
        ({"lr": 1e-3}, "Extra inputs"),
        ({"loss": "foward_kl"}, "forward_kl"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, changes, message):
    with pytest.raises(ValidationError, match=message):
        settings(**changes)


def refused(error, message, config, tmp_path, monkeypatch, **roles):
    monkeypatch.setattr("trt_kd.stages.distill.load_model", None)
    monkeypatch.setattr(OnlineTeacher, "load", None)
    with pytest.raises(error, match=message) as raised:
        distill(config, **roles, out=tmp_path / "out")
    assert raised.value.hint
    assert list(tmp_path.iterdir()) == []


def test_an_objective_on_the_teacher_needs_one(settings, student, tmp_path, monkeypatch):
    message = "response_weight 1 needs a teacher"
    refused(ConfigError, message, settings(), tmp_path, monkeypatch, student=student)


def test_a_teacher_without_effect_is_refused(settings, student, teacher, tmp_path, monkeypatch):
    config, roles = settings().cross_entropy(), {"student": student, "teacher": teacher}
    refused(ConfigError, "would have no effect", config, tmp_path, monkeypatch, **roles)


def test_another_vocabulary_is_refused(make_student, settings, teacher, tmp_path, monkeypatch):
    roles = {"student": make_student(vocab_size=500), "teacher": teacher}
    refused(
        ModelError,
        "500 tokens .* 512; the tokenizer uses 512",
        settings(),
        tmp_path,
        monkeypatch,
        **roles,
    )


def test_another_tokenizer_is_refused(make_student, settings, teacher, tmp_path, monkeypatch):
    other = make_student()
    path = other.path / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    roles = {"student": other, "teacher": teacher}
    refused(ModelError, "tokenizer.json .* differ", settings(), tmp_path, monkeypatch, **roles)


def test_a_smaller_teacher_is_a_mix_up_unless_allowed(
    make_student, settings, student, tmp_path, monkeypatch
):
    roles = {"student": student, "teacher": make_student(num_hidden_layers=2)}
    refused(ModelError, "fewer than the student's", settings(), tmp_path, monkeypatch, **roles)
    monkeypatch.undo()
    done = distill(settings(allow_smaller_teacher=True, steps=1), **roles, out=tmp_path / "small")
    assert done.metrics["steps"] == 1


def test_an_earlier_student_of_the_same_size_may_teach(make_student, settings, student, tmp_path):
    earlier = distill(
        settings(steps=1), student=make_student(), teacher=student, out=tmp_path / "1"
    )
    again = distill(settings(steps=1), student=student, teacher=earlier, out=tmp_path / "2")
    assert again.manifest.inputs["teacher"] == earlier.key


def test_too_little_text_is_found_before_a_model_is_loaded(
    settings, student, teacher, tmp_path, monkeypatch
):
    roles = {"student": student, "teacher": teacher}
    refused(DataError, "holds .* blocks", settings(steps=10**5), tmp_path, monkeypatch, **roles)


# --- settings -----------------------------------------------------------------------------------


def test_settings_round_trip_with_the_options_of_their_plugins(settings):
    config = settings(loss={"kind": "jsd", "beta": 0.3}, task_weight=0.1)
    assert config.model_dump()["loss"] == {"kind": "jsd", "beta": 0.3, "temperature": 1.0}
    assert DistillConfig.model_validate(config.model_dump()) == config
    assert DistillConfig.model_validate_json(config.model_dump_json()) == config


def test_a_rehearsal_makes_two_steps_with_a_checkpoint_each(settings, student, teacher, tmp_path):
    config = settings(steps=500, warmup_steps=50, batch_size=8).rehearsal()
    assert config == DistillConfig.model_validate(config.model_dump())
    assert (config.steps, config.sequences, config.checkpoint_every_steps) == (2, 2, 1)
    trained = distill(config, student=student, teacher=teacher, out=tmp_path / "out")
    assert trained.metrics["steps"] == 2


def test_outside_data_is_part_of_the_identity(settings):
    assert settings().outside() == settings().data.outside() != {}
    assert settings().loss == ForwardKL()
