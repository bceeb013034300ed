"""A distillation that is killed again and again ends like one that is not."""

import json
import sys
from pathlib import Path

import pytest
import torch

from trt_kd.artifacts import Artifact, writing
from trt_kd.checkpoints import save_model
from trt_kd.config import StageConfig

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill_drill.py"


class Noised(StageConfig):
    """Stands for the stage that made a student."""

    stage = "prune"


@pytest.fixture
def student(tmp_path, make_model, tokenizer_dir):
    model = make_model()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    out = tmp_path / "student"
    with writing(out, kind="checkpoint", config=Noised(), inputs={}) as draft:
        save_model(model, draft.path, tokenizer_from=tokenizer_dir)
    return Artifact.open(out)


@pytest.fixture
def drill(student, teacher, text_file, forks):
    """Run the drill on tiny models; its record."""

    def run(kills, *options):
        roles = ["--student", str(student.path), "--teacher", str(teacher.path)]
        size = ["--block-tokens", "32", "--precision", "fp32", "--steps", "8"]
        command = [sys.executable, str(SCRIPT), *roles, *size, "--text", str(text_file)]
        done = forks.run([*command, "--kills", str(kills), *options], cwd=SCRIPT.parents[1])
        assert done.returncode == 0, done.stdout + done.stderr
        *before, last = done.stdout.splitlines()
        table = [line for line in before if line.startswith("|")]
        assert len(table) == 2 + len(json.loads(last)["results"])
        assert len({line.count("|") for line in table}) == 1
        return json.loads(last)["results"]

    return run


def assert_as_if_unbroken(results, kills):
    for row in results:
        assert row["kills"] == kills
        assert row["identical"]
        assert row["largest_loss_difference_nats_per_token"] == 0.0
        assert row["finished_runs"] >= 1


def test_a_run_killed_three_times_at_random_ends_bit_for_bit_like_an_unbroken_one(drill):
    assert_as_if_unbroken(drill(3, "--kinds", "online"), 3)
