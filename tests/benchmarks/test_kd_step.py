"""The script ends with JSON that compares every trainer that is installed, and with the floor."""

import argparse
import importlib.util
import json
import subprocess
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from trt_kd.measuring.statistics import half_range, median
from trt_kd.stages.distill import require_modelopt

require_modelopt()
TINY = ["--layers", "2", "--hidden", "64", "--ffn", "128", "--student-ffn", "96", "--heads", "4"]
TINY += ["--kv-heads", "2", "--vocab", "512", "--batch", "2", "--block-tokens", "32"]
TINY += ["--repeats", "2"]


@pytest.fixture
def script(load_script):
    return load_script("kd_step")


@pytest.fixture
def in_this_process(script, monkeypatch):
    """Children as calls: libraries are loaded once."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # transformers 4 leaves it set
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")

    def child(given, name):
        found = script.task(argparse.Namespace(**vars(given) | {"child": name}))
        return json.loads(json.dumps(found))

    monkeypatch.setattr(script, "child", child)


@pytest.fixture
def children(script, monkeypatch):
    """Children that took what these numbers say; their order, and one that fails, to be set."""

    class Children:
        order: list[str] = []
        fails: str | None = None
        step_s = {"online": 2.0, "cached": 1.0, "modelopt": 3.0, "trl": 4.0, "plain": 2.5}

    known = Children()
    known.order = []

    def child(given, name):
        known.order.append(name)
        if name == known.fails:
            raise subprocess.CalledProcessError(7, name)
        if name == "prepare":
            return {"vocabulary": 512}
        drift = 1.1 if known.order.count(name) == 2 else 1.0
        memory = {"loaded_bytes": 100, "peak_bytes": 300, "load_counted": False}
        if name == "floor":
            seconds = {"student_trunk": 0.5, "student_head": 0.2, "optimizer": 0.1}
            seconds |= {"teacher_trunk": 0.2, "teacher_head": 0.1}
            flops = {part: 1e12 * value for part, value in seconds.items() if part != "optimizer"}
            return memory | {
                "samples_s": {part: [value] * 2 for part, value in seconds.items()},
                "flops": flops,
                "matrix_peak_flops_per_s": 2e12 * drift,
                "matrix_size": 1024,
            }
        peak = 500 if name == "modelopt" else 300
        return memory | {"samples_s": [drift * known.step_s[name]] * 2, "peak_bytes": peak}

    monkeypatch.setattr(script, "child", child)
    monkeypatch.setattr(script, "find_spec", lambda package: package)
    return known


def run(script, capsys, *arguments):
    assert script.main([*TINY, *arguments]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    return json.loads(last), lines


@pytest.mark.filterwarnings("ignore")  # trainers of other libraries warn as they like
def test_every_installed_trainer_is_measured_and_ratios_are_those_of_the_medians(
    script, in_this_process, capsys
):
    record, lines = run(script, capsys)
    results = {one["name"]: one for one in record["results"]}
    assert list(results) == list(script.VARIANTS)
    here = [name for name in results if name != "trl" or find_spec("trl")]
    assert [name for name, one in results.items() if "absent" not in one] == here
    for name in here:
        one = results[name]
        assert len(one["samples_s"]) == 2
        assert one["tokens_per_s"] == pytest.approx(64 / median(one["samples_s"]))
        assert one["spread"] == pytest.approx(half_range(one["samples_s"]))
        assert one["peak_bytes_above_models"] >= 0
        assert one["loaded_bytes"] > 0
        assert one["mfu"] > 0
        if name != "modelopt":
            both = [median(results[each]["samples_s"]) for each in ("modelopt", name)]
            assert record["ratios"][name] == pytest.approx(both[0] / both[1])
    assert record["limits"] == {"online": 1.2, "cached": 1.5, "memory_ratio": 0.5}
    assert record["workload"]["vocabulary"] == 512
    assert record["workload"]["cache_bytes_per_token"] > 0
    assert record["hardware"]["python"]
    floor = record["floor"]
    assert floor["seconds"]["online"] > floor["seconds"]["cached"] > 0
    rows = [line for line in lines if line.startswith("|")]
    assert [row.split(" | ")[0].strip("| ").split(":")[0] for row in rows[2:8]] == list(results)
    assert [row.count("|") for row in rows] == [9] * 8 + [5] * (len(rows) - 8)


def test_operations_of_the_floor_are_those_of_the_formula(script, in_this_process, tmp_path):
    given = script.options().parse_args([*TINY, "--variants", "floor", "--work", str(tmp_path)])
    given.child = "prepare"
    script.task(given)
    given.child = "floor"
    flops = script.task(given)["flops"]
    attention = 2 * 2 * 32**2 * 64 * 2  # both products, half of them, two layers
    projections = 2 * (64 * 64 + 64 * 32)

    def trunk(ffn):
        return 2 * 64 * 2 * (projections + 3 * 64 * ffn) + attention

    head = 2 * (2 * 31) * 64 * 512
    assert flops == {
        "student_trunk": 3 * trunk(96),
        "student_head": 3 * head,
        "teacher_trunk": trunk(128),
        "teacher_head": head,
    }


def test_rounds_run_there_and_back_and_their_samples_pool(script, children, capsys):
    record, _ = run(script, capsys, "--rounds", "2")
    there = list(script.VARIANTS)
    assert children.order == ["prepare", *there, *there[::-1]]
    online = record["results"][0]
    assert online["samples_s"] == pytest.approx([2.0, 2.0, 2.2, 2.2])
    assert online["median_s"] == pytest.approx(2.1)
    assert record["ratios"]["online"] == pytest.approx(1.5)
    assert record["ratios"]["cached"] == pytest.approx(3.0)
    assert record["ratios"]["memory_ratio"]["online"] == pytest.approx(0.5)
    assert record["floor"]["matrix_peak_flops_per_s"] == pytest.approx(2.2e12)


def test_the_floor_sums_what_each_kind_of_step_needs(script, children, capsys):
    record, _ = run(script, capsys)
    assert record["floor"]["seconds"] == {
        "online": pytest.approx(1.0),
        "cached": pytest.approx(0.7),
    }
    assert record["floor"]["flops_seconds"]["online"] == pytest.approx(0.5)
    shares = {one["name"]: one["mfu"] for one in record["results"]}
    assert shares["online"] == pytest.approx(0.25)
    assert shares["cached"] == pytest.approx(0.35)
    assert shares["modelopt"] == pytest.approx(0.5 / 3)


def test_without_the_baseline_there_are_no_ratios(script, children, capsys):
    record, _ = run(script, capsys, "--variants", "cached", "online")
    assert [one["name"] for one in record["results"]] == ["cached", "online"]
    assert record["ratios"] == {}
    assert record["floor"] is None


def test_what_is_not_installed_or_fails_says_so_and_the_rest_is_measured(
    script, children, monkeypatch, capsys
):
    monkeypatch.setattr(script, "find_spec", lambda package: package != "trl" or None)
    children.fails = "plain"
    record, lines = run(script, capsys)
    absent = {one["name"]: one["absent"] for one in record["results"] if "absent" in one}
    assert absent == {"trl": "trl is not installed", "plain": "ended with code 7"}
    assert "trl" not in children.order
    assert any("trl is not installed" in line for line in lines)


def test_a_trainer_of_ours_that_fails_ends_the_run(script, children, capsys):
    children.fails = "online"
    assert script.main(TINY) == 7
    assert capsys.readouterr().out == ""


def test_time_between_steps_does_not_count_and_no_checkpoint_is_written(script):
    meter_class = importlib.import_module("kd_step_variants").Meter
    times = iter([0.0, 1.0, 50.0, 52.0])
    meter, control = meter_class(lambda: next(times)), argparse.Namespace(should_save=True)
    meter.on_train_begin(None, None, control)
    for _ in range(2):
        meter.on_step_begin(None, None, control)
        meter.on_step_end(None, None, control)
    assert meter.seconds == [1.0, 2.0]
    assert meter.peak_bytes >= meter.loaded_bytes > 0
    assert control.should_save is False


def test_checkpoints_are_measured_on_text(script, teacher, text_file, tmp_path, capsys):
    options = ["--student", teacher.path, "--teacher", teacher.path, "--text", text_file]
    options += ["--work", tmp_path, "--child", "prepare"]
    assert script.main([*TINY, *map(str, options)]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["text"] == "text"
    assert facts["parameters"]["student"] == teacher.manifest.metrics["parameters"]
    assert not (tmp_path / "student").exists()


def test_folders_without_a_model_are_two_lines_and_code_2(script, tmp_path, capsys):
    options = ["--student", tmp_path, "--teacher", tmp_path, "--work", tmp_path]
    assert script.main([*map(str, options), "--child", "prepare"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize("wrong", [["--student", "x"], ["--repeats", "1"]])
def test_what_cannot_be_measured_is_refused(script, wrong, capsys):
    with pytest.raises(SystemExit):
        script.main(wrong)
    capsys.readouterr()


@pytest.mark.slow
def test_the_whole_script_runs_with_processes_of_its_own(script, forks, monkeypatch, capsys):
    def run(command, **options):
        """What is measured has a process of its own; what is prepared needs none."""
        return (forks if command[-1] == "prepare" else subprocess).run(command, **options)

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(**vars(subprocess) | {"run": run}))
    assert script.main([*TINY, "--variants", "online", "modelopt"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(record["ratios"]) == {"online", "memory_ratio"}
    assert all(one["peak_bytes_above_models"] > 0 for one in record["results"])
