"""What is wrong with a distillation is said in two lines, and nothing is lost or left behind."""

import logging
import os
import re

import pytest
import torch
from transformers.utils.logging import disable_progress_bar, enable_progress_bar
from typer.testing import CliRunner

from trt_kd.artifacts import Artifact, work_directory, writing
from trt_kd.checkpoints import load_model, save_model
from trt_kd.cli.app import app
from trt_kd.config import StageConfig
from trt_kd.stages.distill import require_modelopt

PROGRESS = re.compile(r"\d\d:\d\d:\d\d |\[")
"""How a line of the log starts: what was done before it met what is wrong."""


class Made(StageConfig):
    stage = "import"
    note: str = ""


@pytest.fixture(scope="module", autouse=True)
def modelopt():
    require_modelopt()


@pytest.fixture
def own_settings():
    """Put back what the command line sets for the whole process."""
    loggers = [logging.getLogger(name) for name in ("trt_kd", "DeepSpeed", None)]
    before = [(x.level, x.propagate, x.handlers[:], x.filters[:]) for x in loggers]
    environment = dict(os.environ)
    disable_progress_bar()
    yield
    enable_progress_bar()
    os.environ.clear()
    os.environ.update(environment)
    for logger, (level, propagate, handlers, filters) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate, logger.handlers, logger.filters = propagate, handlers, filters


@pytest.fixture
def checkpoint(tmp_path, make_model, tokenizer_dir):
    """Write a checkpoint artifact; what it holds is changed by the arguments."""

    def make(name, nan_in=None, tokenizer=None, **changes):
        model = make_model(**changes)
        if nan_in is not None:
            with torch.no_grad():
                model.get_parameter(nan_in).view(-1)[0] = torch.nan
        out = tmp_path / name
        with writing(out, kind="checkpoint", config=Made(note=name), inputs={}) as draft:
            save_model(model, draft.path, tokenizer_from=tokenizer_dir)
            if tokenizer is not None:
                path = draft.path / "tokenizer.json"
                path.write_text(tokenizer(path.read_text("utf-8")), encoding="utf-8")
        return Artifact.open(out)

    return make


@pytest.fixture
def refusal(own_settings, teacher, text_file, tmp_path):
    """Both lines that distilling with these settings ends with, and the checkpoints it keeps."""

    def run(*settings, student=teacher, source=teacher):
        out = tmp_path / "runs" / "out"
        data = f"data={{source: {{kind: text, files: ['{text_file}']}}, block_tokens: 32}}"
        plain = ["steps=4", "batch_size=1", "precision=fp32", "checkpoint_every_steps=1"]
        roles = ["--student", str(student.path), "--teacher", str(source.path), "--out", str(out)]
        done = CliRunner().invoke(app, ["distill", *roles, data, *plain, *settings])
        assert done.exit_code == 2, (done.output, done.exception)
        assert "Traceback" not in done.output
        student.verify()
        source.verify()
        assert {path.name for path in out.parent.iterdir()} <= {".lock", "out.work"}
        what, hint = [line for line in done.stderr.splitlines() if not PROGRESS.match(line)]
        assert what.startswith("error: ")
        assert hint.startswith("  hint: ")
        kept = (work_directory(out) / "checkpoints").glob("checkpoint-*")
        return what, hint, sorted(path.name for path in kept)

    return run


def test_another_tokenizer(refusal, checkpoint):
    other = checkpoint("other", tokenizer=lambda text: text + "\n")
    what, hint, _ = refusal(student=other)
    assert "tokenizer.json" in what
    assert "one tokenizer" in hint


def test_another_vocabulary(refusal, checkpoint):
    what, hint, _ = refusal(source=checkpoint("narrow", vocab_size=500))
    assert "the tokenizer uses 512" in what
    assert "500" in what
    assert "one vocabulary" in hint


def test_a_teacher_smaller_than_the_student(refusal, checkpoint):
    small = checkpoint("small", num_hidden_layers=3)
    what, hint, _ = refusal(source=small)
    assert "fewer than the student's" in what
    assert "the other way round" in hint
    assert "allow_smaller_teacher" in hint


@pytest.mark.parametrize("teacher_kind", ["online", "{kind: cached, k: 8}"])
@pytest.mark.parametrize("role", ["student", "source"])
@pytest.mark.parametrize("monitor", ["monitor.blocks=1", "monitor=null"])
def test_weights_that_are_no_numbers(refusal, checkpoint, role, teacher_kind, monitor):
    damaged = checkpoint("damaged", nan_in="model.layers.1.mlp.down_proj.weight")
    what, hint, kept = refusal(f"teacher={teacher_kind}", monitor, **{role: damaged})
    assert "logits are not finite" in what or "log-probabilities are not finite" in what
    assert "NaN" in hint
    assert kept == []


def test_a_loss_that_diverges_keeps_its_checkpoints(refusal):
    what, hint, kept = refusal("learning_rate=1e30", "monitor=null", "task_weight=1.0")
    assert "diverged at step 2" in what
    assert "smaller learning_rate" in hint
    assert kept == ["checkpoint-1"]


def test_text_too_short_for_the_steps(refusal):
    what, hint, _ = refusal("steps=100000")
    assert "blocks of 32 tokens" in what
    assert "give more text" in hint


def test_held_out_text_too_short_for_the_monitor(refusal):
    what, hint, _ = refusal("monitor.blocks=5000")
    assert "monitor: the heldout split" in what
    assert "monitor=null" in hint


def test_a_smaller_teacher_that_is_allowed_is_learned_from(checkpoint, text_file, tmp_path):
    from trt_kd.stages.distill import DistillConfig, distill

    source = {"kind": "text", "files": [str(text_file)]}
    config = DistillConfig.model_validate(
        {"steps": 1, "batch_size": 1, "precision": "fp32", "allow_smaller_teacher": True,
         "data": {"source": source, "block_tokens": 32}, "monitor": None}
    )  # fmt: skip
    roles = {"student": checkpoint("large"), "teacher": checkpoint("small", num_hidden_layers=3)}
    before = load_model(roles["student"].path).state_dict()
    made = distill(config, **roles, out=tmp_path / "out")
    after = load_model(made.path).state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
