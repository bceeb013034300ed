"""What tests of stages share: text, short distillations of tiny models, and what these leave."""

import json

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="session")
def data(text_file):
    """Settings of text in short blocks."""
    return {"source": {"kind": "text", "files": [str(text_file)]}, "block_tokens": 32}


@pytest.fixture(scope="session")
def modelopt():
    """Import ModelOpt with the warnings that it causes while it is imported."""
    from trt_kd.stages.distill import require_modelopt

    require_modelopt()


@pytest.fixture(scope="session")
def make_settings(data, modelopt):
    """Make a maker of settings of short distillations in float32 without a monitor.

    Keyword arguments replace what all have in common; those of what is made replace both, and its
    positional ones are features. ``data`` is merged.
    """
    from trt_kd.stages.distill import DistillConfig

    common = {
        "steps": 4,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "checkpoint_every_steps": 2,
        "precision": "fp32",
        "monitor": None,
    }

    def make_settings(**own):
        text = data | own.pop("data", {})

        def settings(*features, **changes):
            listed = {"features": list(features)} if features else {}
            return DistillConfig.model_validate(common | own | {"data": text} | listed | changes)

        return settings

    return make_settings


@pytest.fixture(scope="module")
def roles(student, teacher):
    """Whom a distillation takes; tests say who their student is."""
    return {"student": student, "teacher": teacher}


@pytest.fixture(scope="session")
def log_of():
    """Read a log of an artifact, row by row, without times unless they are asked for."""

    def log_of(artifact, name="history", *, times=False):
        lines = (artifact.path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = map(json.loads, lines)
        return [{k: v for k, v in row.items() if times or "seconds" not in k} for row in rows]

    return log_of


@pytest.fixture(scope="session")
def weights_of():
    """Read the weights of a checkpoint artifact."""
    return lambda artifact: load_file(artifact.path / "model.safetensors")


@pytest.fixture(scope="session")
def assert_same_weights(weights_of):
    """Compare the weights of two artifacts bit for bit."""

    def assert_same_weights(one, other):
        torch.testing.assert_close(weights_of(one), weights_of(other), rtol=0, atol=0)

    return assert_same_weights


@pytest.fixture(scope="session")
def assert_same_run(assert_same_weights, log_of):
    """Compare weights and history of two artifacts bit for bit."""

    def assert_same_run(one, other):
        assert_same_weights(one, other)
        assert log_of(one) == log_of(other)

    return assert_same_run


@pytest.fixture
def cut_off(modelopt, monkeypatch):
    """Interrupt a run before it begins a step, counted from 1."""
    from trt_kd.training import callbacks

    def cut_off(run, step):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step + 1 == step:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(callbacks.MarkCheckpoints, "on_step_begin", on_step_begin)
            with pytest.raises(KeyboardInterrupt):
                run()

    return cut_off
