"""The script ends with JSON that holds both ratios, and measures each pass apart."""

import json

import pytest

TINY = ["--layers", "2", "--hidden", "64", "--ffn", "128", "--heads", "4", "--kv-heads", "2"]
TINY += ["--vocab", "512", "--blocks", "2", "--block-tokens", "16", "--batch", "1"]


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("importance_pass")


@pytest.fixture
def measured(script, monkeypatch):
    """Children that took what these numbers say."""
    mib = 2**20
    found = {
        "plain": {"loaded_bytes": 300 * mib, "peak_bytes": 400 * mib, "load_counted": False},
        "scoring": {"loaded_bytes": 300 * mib, "peak_bytes": 440 * mib, "load_counted": False},
        "time": {
            "plain": [1.0, 1.7, 1.2],
            "scoring": [1.05, 1.785, 1.26],
            "parameters": 10,
            "threads": 2,
        },
    }
    monkeypatch.setattr(script, "child", lambda given, task: found[task])


def test_the_last_line_is_the_record_and_the_table_stands_above(script, measured, capsys):
    assert script.main([]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    record = json.loads(last)
    assert record["time_ratio"] == pytest.approx(1.05)
    assert record["time_ratio_interval"] == pytest.approx([1.05, 1.05])
    assert record["memory_ratio"] == pytest.approx(1.1)
    assert record["spread"] == pytest.approx(0.35 / 1.2)
    assert record["hardware"]["python"]
    assert record["workload"]["axes"] == ["ffn", "heads", "kv_heads", "hidden", "depth"]
    assert record["repeats"] == 7
    assert len({line.count("|") for line in table if line.startswith("|")}) == 1


@pytest.mark.parametrize("task", ["time", "plain", "scoring"])
def test_a_child_prints_what_its_parent_reads(script, task, capsys):
    assert script.main([*TINY, "--repeats", "2", "--child", task]) == 0
    found = json.loads(capsys.readouterr().out)
    if task == "time":
        assert [len(found[name]) for name in script.PASSES] == [2, 2]
        assert found["parameters"] > 0
    else:
        assert found["peak_bytes"] >= found["loaded_bytes"] > 0


def test_a_checkpoint_can_be_measured(script, teacher, capsys):
    arguments = ["--model", str(teacher.path), *TINY, "--repeats", "2", "--child", "time"]
    assert script.main(arguments) == 0
    assert (
        json.loads(capsys.readouterr().out)["parameters"] == teacher.manifest.metrics["parameters"]
    )


def test_a_folder_without_a_model_is_two_lines_and_code_2(script, tmp_path, capsys):
    assert script.main(["--model", str(tmp_path), "--repeats", "2", "--child", "time"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.slow
def test_the_whole_script_runs(script, forks, monkeypatch, capfd):
    monkeypatch.setattr(script, "subprocess", forks)
    assert script.main([*TINY, "--repeats", "2"]) == 0
    record = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert record["memory_ratio"] > 0.5
    assert record["workload"]["model"]["layers"] == 2
