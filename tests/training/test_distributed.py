"""Two processes over gloo do what one does, sharded or not, and neither waits for a dead one.

All training is done by one pair, forked from a process that has imported everything, job by job;
what they found lies in a file for each. The first of them also does what one process does alone.
"""

import json
import os
import socket
import sys
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from trt_kd.artifacts import Artifact
from trt_kd.errors import ConfigError
from trt_kd.stages.distill import DistillConfig
from trt_kd.stages.matching import check_processes
from trt_kd.training.distributed import Processes, joined, launched, require_one_process
from trt_kd.training.schedule import Schedule

TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}
"""For weights and losses: sums over processes are taken in another order."""

WORKER = """
import gc, json, logging, os, sys
from dataclasses import replace
from pathlib import Path
from trt_kd.artifacts import Artifact, work_directory
from trt_kd.errors import TrtKdError
from trt_kd.stages import distill as stage

stage.require_modelopt()
from trt_kd.training import alarms, callbacks, loop, sharding

gc.freeze()  # what was imported is not looked through again and again
other = os.fork()
rank = int(bool(other))  # the parent is the second, and the last to go
jobs, student, teacher, results = sys.argv[1:]
roles = {"student": Artifact.open(Path(student)), "teacher": Artifact.open(Path(teacher))}
together = dict(os.environ, RANK=str(rank), LOCAL_RANK=str(rank))
alone = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
found = {}

def interrupt_in(step):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step + 1 == step:
            raise KeyboardInterrupt
    callbacks.MarkCheckpoints.on_step_begin = on_step_begin

def raise_alarm_at(step):
    alarms.ALARMS = tuple(
        replace(alarm, fires=lambda steps, measured: step and len(steps) == step)
        if alarm.name == "response_rises" else alarm
        for alarm in alarms.ALARMS
    )

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

class Hear(logging.Handler):
    def emit(self, record):
        found[name]["said"].append(record.getMessage())
logging.getLogger("trt_kd.training.watching").addHandler(Hear())

for name, job in json.loads(jobs).items():
    found[name] = {"said": []}
    if job["alone"] and rank:
        continue
    os.environ.clear()
    os.environ.update(alone if job["alone"] else together)
    interrupt_in(job["cut"])
    raise_alarm_at(job["alarm"])
    stage.save_model = refuse if job["full_disk"] else save
    config, out = stage.DistillConfig.model_validate(job["config"]), Path(job["out"])
    try:
        teacher = Artifact.open(Path(job["teacher"])) if job["teacher"] else roles["teacher"]
        made = stage.distill(config, student=roles["student"], teacher=teacher, out=out)
        found[name]["processes"] = made.metrics["processes"]
    except (TrtKdError, KeyboardInterrupt) as error:
        found[name]["error"] = f"{type(error).__name__}: {error}"
        kept = (work_directory(out) / "checkpoints").glob("*")
        found[name]["kept"] = [path.name for path in kept]
Path(results, f"{rank}.json").write_text(json.dumps(found))
if other:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
"""


@pytest.fixture(scope="module")
def student(make_student):
    return make_student(num_hidden_layers=2)


@pytest.fixture(scope="module")
def stranger(make_student, other_tokenizer):
    """A teacher with another tokenizer."""
    return make_student(noise=0.0, tokenizer=other_tokenizer, vocab_size=320)


@pytest.fixture(scope="module")
def settings(text_file):
    def make(**changes):
        return {
            "data": {"source": {"kind": "text", "files": [str(text_file)]}, "block_tokens": 32},
            "steps": 4,
            "batch_size": 1,
            "gradient_accumulation": 4,
            "learning_rate": 1e-3,
            "checkpoint_every_steps": 2,
            "precision": "fp32",
            "task_weight": 0.5,
            "monitor": {"every_steps": 2, "blocks": 2, "skip_blocks": 0},
        } | changes

    return make


def all_jobs(settings, student, stranger, traces, folder):
    """What the pair does, in order; of what is begun again every part has the same folder."""
    fsdp2 = {"sharding": "fsdp2"}
    bf16 = {"steps": 2, "precision": "bf16"}
    short = {"steps": 2, "checkpoint_every_steps": 4}
    cached = short | {"teacher": {"kind": "cached", "k": 64}}
    others = {"others": [str(student.path)], "weights": [2, 1]}
    several = short | {"teacher": {"kind": "several"} | others, "monitor": None}
    stopped = {"stop_on": ["response_rises"]}
    write = {"share": 1.0, "prompt_tokens": 8, "new_tokens": 6}
    own = short | {"monitor": None, "task_weight": 0.0, "on_policy": write}
    minillm = own | {"loss": "reverse_kl"}
    minillm["on_policy"] = write | {"policy_gradient": {"teacher_mix": 0.3}}
    exits = short | {"monitor": None, "exits": {"layers": [0]}}
    cross = short | {"teacher": "cross_tokenizer", "loss": "uld"}
    stranger = {"teacher": str(stranger.path)}
    reasons = {"source": traces, "block_tokens": 96, "heldout_share": 0.2}
    tasks = short | {"data": reasons, "two_tasks": {"rationale_weight": 0.5}}
    jobs = {
        "alone": {"alone": True},
        "ddp": {},
        "fsdp2": {"config": fsdp2},
        "bf16_alone": {"alone": True, "config": bf16},
        "bf16": {"config": bf16 | fsdp2},
        "cached_alone": {"alone": True, "config": cached},
        "cached": {"config": cached},
        "several_alone": {"alone": True, "config": several},
        "several": {"config": several},
        "own_alone": {"alone": True, "config": own},
        "own": {"config": own},
        "minillm_alone": {"alone": True, "config": minillm},
        "minillm": {"config": minillm},
        "exits_alone": {"alone": True, "config": exits},
        "exits": {"config": exits},
        "cross_alone": {"alone": True, "config": cross} | stranger,
        "cross": {"config": cross} | stranger,
        "tasks_alone": {"alone": True, "config": tasks},
        "tasks": {"config": tasks},
        "relay_1": {"alone": True, "config": stopped, "alarm": 1},
        "relay_2": {"cut": 3},
        "relay_3": {"config": fsdp2 | stopped, "alarm": 3},
        "relay_4": {"alone": True},
        "taken": {},
        "full_disk": {"full_disk": True, "config": {"steps": 1, "monitor": None}},
    }
    plain = {"alone": False, "cut": 0, "alarm": 0, "full_disk": False, "teacher": ""}
    for name, job in jobs.items():
        out = str(folder / name.partition("_")[0] if "relay" in name else folder / name)
        yield name, plain | job | {"out": out, "config": settings(**job.get("config", {}))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pair")


@pytest.fixture(scope="module")
def jobs(settings, student, stranger, traces, folder):
    return dict(all_jobs(settings, student, stranger, traces, folder))


@pytest.fixture(scope="module")
def pair(jobs, student, teacher, forks, folder):
    """All jobs of both processes: where they wrote and what each of them found."""
    (folder / "taken").mkdir()
    arguments = [json.dumps(jobs), str(student.path), str(teacher.path), str(folder)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = forks.run(
        [sys.executable, "-c", WORKER, *arguments],
        env=os.environ | meeting | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads((folder / f"{rank}.json").read_text("utf-8")) for rank in range(2)]
    return SimpleNamespace(folder=folder, found=found)


@pytest.fixture
def made(pair):
    """What a job wrote."""
    return lambda name: Artifact.open(pair.folder / name)


def weights(artifact):
    return load_file(artifact.path / "model.safetensors")


def rows(artifact, name):
    """Rows of a log, without times."""
    lines = (artifact.path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [{n: v for n, v in json.loads(line).items() if "seconds" not in n} for line in lines]


def assert_same_training(one, other, logs=("history", "monitors"), flips=0.0):
    """``flips``: share of weights that may differ, as rounding turns the sign of their gradient."""
    found, expected = weights(one), weights(other)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        off = ~torch.isclose(found[name], weight, **TOLERANCE)
        assert off.double().mean() <= flips, name
    for log in logs:
        for row, expected in zip(rows(one, log), rows(other, log), strict=True):
            assert row == pytest.approx(expected, rel=1e-4)
    for name in ("tokens_trained", "data_fingerprint", "steps", "parameters"):
        assert one.metrics[name] == other.metrics[name]
    assert one.key == other.key


# --- what they compute --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes_train_and_measure_as_one_does_on_the_same_blocks(pair, made, name):
    assert_same_training(made(name), made("alone"))
    assert [found[name]["processes"] for found in pair.found] == [2, 2]
    assert made("alone").metrics["processes"] == 1


def test_what_is_compared_holds_gradients_by_layer_and_the_teacher_on_held_out_text(made):
    first, *_, last = rows(made("fsdp2"), "monitors")
    assert (first["step"], last["step"]) == (0, 4)
    assert {"heldout_kl_nats_per_token", "grad_norm_layer_0", "grad_norm_layer_1"} <= last.keys()
    assert (made("fsdp2").path / "tensorboard").is_dir()


def test_two_processes_round_as_one_does(made):
    """In bfloat16 a sum in another order may round otherwise; a cast elsewhere would cost more."""
    found, expected = made("bf16"), made("bf16_alone")
    torch.testing.assert_close(weights(found), weights(expected), rtol=0, atol=1e-4)
    for name in ("loss_nats_per_token", "heldout_kl_nats_per_token"):
        assert found.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-5)


def test_under_fsdp2_each_process_holds_a_part_and_otherwise_all(pair, made):
    parts = [found["fsdp2"]["own"] for found in pair.found]
    assert sum(parts) == made("alone").metrics["parameters"]
    assert max(parts) < 0.6 * sum(parts)
    for found in pair.found:
        assert found["fsdp2"]["sharded"]
        assert (found["ddp"]["sharded"], found["ddp"]["own"]) == (False, sum(parts))


def test_two_processes_share_one_cache_of_a_teacher(made):
    assert_same_training(made("cached"), made("cached_alone"))


def test_two_processes_mix_several_teachers_as_one_does(made):
    assert_same_training(made("several"), made("several_alone"), logs=["history"])


@pytest.mark.parametrize("name", ["own", "minillm"])
def test_two_processes_write_and_learn_what_one_does(made, name):
    assert_same_training(made(name), made(f"{name}_alone"), logs=["history"])
    assert all(row["generated_tokens"] > 0 for row in rows(made(name), "history"))


def test_two_processes_leave_early_as_one_does(made):
    assert_same_training(made("exits"), made("exits_alone"), logs=["history"])
    assert all(row["exit_0_nats_per_token"] > 0 for row in rows(made("exits"), "history"))


def test_two_processes_hear_a_teacher_with_another_tokenizer_as_one_does(made):
    flips = 0.005  # uld is an absolute difference: where two shares are equal it has no slope
    assert_same_training(made("cross"), made("cross_alone"), flips=flips)
    assert all(row["aligned_share"] > 0 for row in rows(made("cross"), "history"))


def test_two_processes_answer_and_say_why_as_one_does(made):
    """Of the passes of a step one process reads the answers, the other the rationales."""
    assert_same_training(made("tasks"), made("tasks_alone"))
    for row in rows(made("tasks"), "history"):
        parts = row["label_nats_per_token"], row["rationale_nats_per_token"]
        assert min(parts) > 0
        assert row["task_nats_per_token"] == pytest.approx(parts[0] + 0.5 * parts[1])


# --- how they go on -----------------------------------------------------------------------------


def test_a_run_goes_on_with_another_number_of_processes_sharded_or_not(pair, made):
    """One process began, two went on, sharded in the end, and one finished."""
    kept = [[found[f"relay_{part}"].get("kept") for part in (1, 2, 3)] for found in pair.found]
    assert kept[0] == [["checkpoint-1"], ["checkpoint-2"], ["checkpoint-3"]]
    assert kept[1] == [None, *kept[0][1:]]
    assert_same_training(made("relay"), made("alone"))


def test_an_alarm_stops_all_processes_and_the_first_says_it(pair):
    for found in pair.found:
        assert "stopped at step 3 by the alarm response_rises" in found["relay_3"]["error"]
    assert [len(found["relay_3"]["said"]) for found in pair.found] == [1, 0]


# --- how they fail ------------------------------------------------------------------------------


def test_the_others_stop_when_one_is_interrupted(pair):
    for found in pair.found:
        assert found["relay_2"]["error"].startswith("KeyboardInterrupt")


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


# --- what they do not do ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"features": [{"loss": "mse"}]}, "features: learnt in one process, 2 were"),
        ({"balance": {}}, "balance: learnt in one process, 2 were"),
        (
            {"teacher": {"kind": "served", "url": "http://127.0.0.1:1/v1", "model": "tiny"}},
            "teacher served works in one process, 2 were",
        ),
    ],
)
def test_what_is_not_known_to_work_in_several_processes_is_refused(settings, changes, what):
    config = DistillConfig.model_validate(settings(**changes))
    check_processes(config, 1)
    with pytest.raises(ConfigError, match=what) as raised:
        check_processes(config, 2)
    assert "without a launcher" in raised.value.hint


def test_several_teachers_are_not_sharded(settings):
    several = {"kind": "several", "others": ["elsewhere"]}
    with pytest.raises(ValidationError, match="sharding fsdp2 takes one teacher, not several"):
        DistillConfig.model_validate(settings(teacher=several, sharding="fsdp2"))


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
