"""Two processes over gloo do what one does, sharded or not, and neither waits for a dead one.

Both are started once, forked from one that has imported everything, and go through all jobs; what
they found lies in a file for each.
"""

import json
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from trt_kd.artifacts import Artifact, work_directory, writing
from trt_kd.checkpoints import save_model
from trt_kd.config import StageConfig
from trt_kd.errors import ConfigError
from trt_kd.stages.distill import DistillConfig, distill
from trt_kd.training import callbacks
from trt_kd.training.distributed import Processes, joined, launched, require_one_process
from trt_kd.training.schedule import Schedule

STEPS = 3
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}
"""For weights and losses: sums over processes are taken in another order."""

WORKER = """
import json, os, sys
from pathlib import Path
from trt_kd.artifacts import Artifact
from trt_kd.errors import TrtKdError
from trt_kd.stages import distill as stage

stage.require_modelopt()
from trt_kd.training import callbacks, loop, sharding

other = os.fork()
os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(int(bool(other)))
jobs, student, teacher, results = sys.argv[1:]
roles = {"student": Artifact.open(Path(student)), "teacher": Artifact.open(Path(teacher))}
rank = int(os.environ["RANK"])
found = {}

def interrupt_in(step):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step + 1 == step:
            raise KeyboardInterrupt
    callbacks.MarkCheckpoints.on_step_begin = on_step_begin

def refuse(*_, **__):
    raise OSError(28, "No space left on device")

whole = sharding.in_one_piece
def look(model, load):
    found[name]["sharded"] = any(type(p).__name__ == "DTensor" for p in model.parameters())
    found[name]["own"] = sum(
        getattr(p, "_local_tensor", p).numel() for p in model.parameters()
    )
    return whole(model, load)
sharding.in_one_piece = look
save = stage.save_model

for name, job in json.loads(jobs).items():
    found[name] = {}
    interrupt_in(job["cut"])
    stage.save_model = refuse if job["full_disk"] else save
    config = stage.DistillConfig.model_validate(job["config"])
    try:
        made = stage.distill(config, **roles, out=Path(job["out"]))
        found[name]["processes"] = made.metrics["processes"]
    except (TrtKdError, KeyboardInterrupt) as error:
        found[name]["error"] = f"{type(error).__name__}: {error}"
Path(results, f"{rank}.json").write_text(json.dumps(found))
if other:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
"""


class NoisedConfig(StageConfig):
    """Stands for the stage that made a student."""

    stage = "prune"


@pytest.fixture(scope="module")
def student(tmp_path_factory, make_model, tokenizer_dir):
    model = make_model(num_hidden_layers=2)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    out = tmp_path_factory.mktemp("student") / "student"
    with writing(out, kind="checkpoint", config=NoisedConfig(), inputs={}) as draft:
        save_model(model, draft.path, tokenizer_from=tokenizer_dir)
    return Artifact.open(out)


@pytest.fixture(scope="module")
def settings(text_file):
    def make(**changes):
        return {
            "data": {"source": {"kind": "text", "files": [str(text_file)]}, "block_tokens": 32},
            "steps": STEPS,
            "batch_size": 1,
            "gradient_accumulation": 4,
            "learning_rate": 1e-3,
            "checkpoint_every_steps": 2,
            "precision": "fp32",
            "task_weight": 0.5,
            "monitor": {"every_steps": 2, "blocks": 3, "skip_blocks": 0},
        } | changes

    return make


def alone(settings, student, teacher, out, *, cut=None):
    """One process, interrupted before the step ``cut``."""
    with pytest.MonkeyPatch.context() as patch:
        if cut:

            def interrupt(self, args, state, control, **_):
                if state.global_step + 1 == cut:
                    raise KeyboardInterrupt

            patch.setattr(callbacks.MarkCheckpoints, "on_step_begin", interrupt)
            with pytest.raises(KeyboardInterrupt):
                alone(settings, student, teacher, out)
            return None
        config = DistillConfig.model_validate(settings)
        return distill(config, student=student, teacher=teacher, out=out)


@pytest.fixture(scope="module")
def whole(settings, student, teacher, tmp_path_factory):
    """One process without interruption."""
    return alone(settings(), student, teacher, tmp_path_factory.mktemp("whole") / "out")


@pytest.fixture(scope="module")
def pair(settings, student, teacher, tmp_path_factory):
    """All jobs of both processes: where they wrote and what each of them found."""
    folder = tmp_path_factory.mktemp("pair")
    cached = {"teacher": {"kind": "cached", "k": 64}}
    jobs = {
        "ddp": {},
        "ddp_cut": {"cut": 3},
        "ddp_resumed": {},
        "cached": {"config": settings(**cached)},
        "taken": {},
        "full_disk": {"full_disk": True},
        "fsdp2": {"config": settings(sharding="fsdp2")},
        "fsdp2_cut": {"config": settings(sharding="fsdp2"), "cut": 3},
        "fsdp2_bf16": {"config": settings(sharding="fsdp2", precision="bf16")},
        "fsdp2_resumed": {"config": settings(sharding="fsdp2")},
    }
    plain = {"config": settings(), "cut": 0, "full_disk": False}
    jobs = {name: plain | {"out": str(folder / name)} | job for name, job in jobs.items()}
    (folder / "taken").mkdir()
    for name in ("ddp_resumed", "fsdp2_resumed"):
        alone(settings(), student, teacher, folder / name, cut=3)
    arguments = [json.dumps(jobs), str(student.path), str(teacher.path), str(folder)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = subprocess.run(
        [sys.executable, "-c", WORKER, *arguments],
        env=os.environ | meeting | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads((folder / f"{rank}.json").read_text("utf-8")) for rank in range(2)]
    return SimpleNamespace(folder=folder, found=found)


def weights(artifact):
    return load_file(artifact.path / "model.safetensors")


def rows(artifact, name):
    """Rows of a log, without times."""
    lines = (artifact.path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [{n: v for n, v in json.loads(line).items() if "seconds" not in n} for line in lines]


def assert_same_training(one, other):
    torch.testing.assert_close(weights(one), weights(other), **TOLERANCE)
    for name in ("history", "monitors"):
        for row, expected in zip(rows(one, name), rows(other, name), strict=True):
            assert row == pytest.approx(expected, rel=1e-4)
    for name in ("tokens_trained", "data_fingerprint", "steps", "parameters"):
        assert one.metrics[name] == other.metrics[name]
    assert one.key == other.key


# --- what they compute --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_does_on_the_same_blocks(pair, whole, name):
    assert_same_training(Artifact.open(pair.folder / name), whole)
    assert [found[name]["processes"] for found in pair.found] == [2, 2]
    assert whole.metrics["processes"] == 1


def test_two_processes_round_as_one_does(pair, settings, student, teacher, tmp_path):
    """In bfloat16 a sum in another order may round otherwise; a cast elsewhere would cost more."""
    expected = alone(settings(precision="bf16"), student, teacher, tmp_path / "out")
    made = Artifact.open(pair.folder / "fsdp2_bf16")
    torch.testing.assert_close(weights(made), weights(expected), rtol=0, atol=1e-4)
    assert made.metrics["loss_nats_per_token"] == pytest.approx(
        expected.metrics["loss_nats_per_token"], rel=1e-5
    )


def test_under_fsdp2_each_process_holds_a_part_and_otherwise_all(pair, whole):
    parts = [found["fsdp2"]["own"] for found in pair.found]
    assert sum(parts) == whole.metrics["parameters"]
    assert max(parts) < 0.6 * sum(parts)
    for found in pair.found:
        assert found["fsdp2"]["sharded"]
        assert (found["ddp"]["sharded"], found["ddp"]["own"]) == (False, sum(parts))


def test_two_processes_share_one_cache_of_a_teacher(pair, settings, student, teacher, tmp_path):
    config = settings(teacher={"kind": "cached", "k": 64})
    expected = alone(config, student, teacher, tmp_path / "out")
    assert_same_training(Artifact.open(pair.folder / "cached"), expected)


# --- how they go on -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddp_resumed", "fsdp2_resumed"])
def test_what_one_process_began_two_finish(pair, whole, name):
    assert_same_training(Artifact.open(pair.folder / name), whole)


@pytest.mark.parametrize("name", ["ddp_cut", "fsdp2_cut"])
def test_what_two_processes_began_one_finishes(pair, whole, settings, student, teacher, name):
    for found in pair.found:
        assert found[name]["error"].startswith("KeyboardInterrupt")
    out = pair.folder / name
    checkpoints = work_directory(out) / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-2"]
    assert_same_training(alone(settings(), student, teacher, out), whole)


# --- how they fail ------------------------------------------------------------------------------


def test_the_others_stop_when_the_first_cannot_begin(pair):
    first, second = (found["taken"]["error"] for found in pair.found)
    assert first.startswith("ArtifactError: ")
    assert "exists already" in first
    assert second.startswith(f"TrtKdError: process 0 stopped: {first.splitlines()[0]}")


def test_the_others_stop_when_the_first_fails_in_the_end(pair):
    first, second = (found["full_disk"]["error"] for found in pair.found)
    assert "No space left" in first
    assert second.startswith("TrtKdError: process 0 stopped: ArtifactError: ")
    assert not (pair.folder / "full_disk").exists()


# --- one process and its environment ------------------------------------------------------------


def test_a_single_process_is_its_own_first_and_joins_nothing():
    with joined() as processes:
        assert processes == Processes()
        assert processes.share(lambda: {"a": 1}) == {"a": 1}
        with processes.main_first():
            processes.wait()
    assert not torch.distributed.is_initialized()


def test_half_a_launcher_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"):
        launched()


def test_what_one_process_does_is_refused_to_several(monkeypatch):
    require_one_process("trt-kd prune")
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ConfigError, match="trt-kd prune works in one process, 2 were started"):
        require_one_process("trt-kd prune")


@pytest.mark.parametrize(("accumulation", "processes", "passes"), [(1, 1, 1), (8, 4, 2), (8, 8, 1)])
def test_processes_share_the_passes_of_a_step(accumulation, processes, passes):
    schedule = Schedule(gradient_accumulation=accumulation)
    assert schedule.passes(processes) == passes


def test_passes_that_cannot_be_shared_are_refused():
    with pytest.raises(ConfigError, match="gradient_accumulation 3 cannot be shared by 2 proc"):
        Schedule(gradient_accumulation=3).passes(2)


def test_sharding_over_one_process_is_refused():
    with pytest.raises(ConfigError, match="has no effect in one process"):
        Schedule(sharding="fsdp2").passes(1)


def test_sharding_is_no_part_of_a_run_s_identity():
    assert DistillConfig(sharding="fsdp2").model_dump() == DistillConfig().model_dump()
