"""What is wrong with a request for pruning is said in two lines, and nothing is left behind."""

import logging
import os
import re

import pytest
import torch
from transformers.utils.logging import disable_progress_bar, enable_progress_bar
from typer.testing import CliRunner

from trt_kd.artifacts import Artifact, writing
from trt_kd.checkpoints import load_model, save_model
from trt_kd.cli.app import app
from trt_kd.config import StageConfig

LOCK = ".lock"
PROGRESS = re.compile(r"\d\d:\d\d:\d\d ")
"""How a line of the log starts: what was done before it met what is wrong."""
FFN = "axes=[{kind: ffn, size: 64}]"


class Made(StageConfig):
    stage = "import"


@pytest.fixture
def own_settings():
    """Put back what the command line sets for the whole process."""
    loggers = [logging.getLogger(name) for name in ("trt_kd", "DeepSpeed", None)]
    before = [(x.level, x.propagate, x.handlers[:], x.filters[:]) for x in loggers]
    environment = dict(os.environ)
    # A new process reads the command line's setting for this when it imports transformers.
    disable_progress_bar()
    yield
    enable_progress_bar()
    os.environ.clear()
    os.environ.update(environment)
    for logger, (level, propagate, handlers, filters) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate, logger.handlers, logger.filters = propagate, handlers, filters


@pytest.fixture
def refusal(own_settings, teacher, text_file, tmp_path):
    """Both lines that pruning with these settings ends with."""

    def run(*settings, source=teacher, text=text_file):
        folder = tmp_path / "runs"
        folder.mkdir()
        data = f"data={{source: {{kind: text, files: ['{text}']}}, block_tokens: 32}}"
        command = ["prune", "--source", str(source.path), "--out", str(folder / "student")]
        done = CliRunner().invoke(app, [*command, data, "calibration_tokens=128", *settings])
        assert done.exit_code == 2, (done.output, done.exception)
        assert {path.name for path in folder.iterdir()} <= {LOCK}
        lines = done.stderr.splitlines()
        what, hint = [line for line in lines if not PROGRESS.match(line)]
        assert lines[-2:] == [what, hint]
        assert what.startswith("error: ")
        assert hint.startswith("  hint: ")
        assert "Traceback" not in done.output
        return what, hint

    return run


@pytest.fixture
def poisoned(teacher, tmp_path):
    """The same model with one weight that is no number, by the parameter's name."""

    def make(name):
        model = load_model(teacher.path)
        with torch.no_grad():
            model.get_parameter(name).view(-1)[0] = torch.nan
        out = tmp_path / "poisoned"
        with writing(out, kind="checkpoint", config=Made(), inputs={}) as draft:
            save_model(model, draft.path, tokenizer_from=teacher.path)
        return Artifact.open(out)

    return make


@pytest.mark.parametrize(
    ("axis", "present"),
    [
        ("{kind: ffn, size: 640}", 128),
        ("{kind: hidden, size: 1024}", 64),
        ("{kind: heads, size: 16}", 2),
        ("{kind: depth, layers: 9}", 4),
        ("{kind: vocab, size: 4096}", 512),
    ],
)
def test_a_target_larger_than_the_model(refusal, axis, present):
    what, hint = refusal(f"axes=[{axis}]")
    assert f"is larger than the model's {present}" in what
    assert f"at most {present}" in hint


@pytest.mark.parametrize("limit", ["params=1%", "memory_mb=0.01"])
@pytest.mark.parametrize("axis", ["ffn", "depth", "vocab"])
def test_an_impossible_budget(refusal, axis, limit):
    what, hint = refusal(f"axes=[{axis}]", f"budget.{limit}")
    assert f"axis '{axis}' cannot bring the model to" in what
    assert "raise the budget" in hint


@pytest.mark.parametrize("axis", ["experts", "expert_ffn"])
def test_an_axis_that_the_family_lacks(refusal, axis):
    what, hint = refusal(f"axes=[{{kind: {axis}, size: 2}}]")
    assert f"axis '{axis}': a llama model cannot be cut along it" in what
    assert "it has hidden, ffn, heads" in hint


@pytest.mark.parametrize("importance", ["activation", "random", "taylor"])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"]
)
def test_activations_that_are_no_numbers(refusal, poisoned, name, importance):
    what, hint = refusal(FFN, f"importance={importance}", source=poisoned(name))
    assert "not finite" in what
    assert "checkpoint is damaged" in hint


def test_activations_of_layers_that_are_no_numbers(refusal, poisoned):
    source = poisoned("model.layers.3.mlp.up_proj.weight")
    what, _ = refusal("axes=[{kind: depth, layers: 3}]", source=source)
    assert "not finite" in what


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_text_shorter_than_one_block(refusal, tmp_path, suffix):
    text = tmp_path / f"little.{suffix}"
    line = "A few words."
    text.write_text(f'{{"text": "{line}"}}\n' if suffix == "jsonl" else line, encoding="utf-8")
    source = [f"data.source={{kind: jsonl, files: ['{text}']}}"] if suffix == "jsonl" else []
    what, hint = refusal(FFN, *source, text=text)
    assert "tokens" in what
    assert hint


@pytest.mark.parametrize("limit", ["params=100000000", "memory_mb=4096", "active_params=99999999"])
@pytest.mark.parametrize("axis", ["ffn", "depth"])
def test_a_budget_that_the_model_fits_unpruned(refusal, axis, limit):
    what, hint = refusal(f"axes=[{axis}]", f"budget.{limit}")
    assert "the model fits the budget unpruned" in what
    assert "ask for less" in hint


def test_an_illegal_size_names_the_nearest_legal_ones(refusal):
    target = "target={format: int4_awq, runtime: trtllm, gpu: hopper}"
    what, hint = refusal("axes=[{kind: ffn, size: 96, multiple_of: 32}]", target)
    assert "ffn 96" in what
    assert "illegal for int4_awq" in what
    assert "128" in hint


def test_a_size_off_the_grid_names_the_nearest_ones(refusal):
    what, hint = refusal("axes=[{kind: ffn, size: 100}]")
    assert "100 is off the grid" in what
    assert "64 and 128" in hint
