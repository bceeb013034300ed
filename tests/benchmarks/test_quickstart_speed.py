"""The script ends with JSON that holds both variants and the speed-up."""

import json

import pytest

from trt_kd.artifacts import Artifact, writing
from trt_kd.stages.benchmark import BenchmarkConfig


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("quickstart_speed")


@pytest.fixture
def measured(tmp_path):
    """A finished benchmark: the candidate takes half the time and does not fit batch 8."""
    workload = {"backend": "ort-genai", "format": "int4", "decode_floor_ms": 1.5}
    record = workload | {
        "batch_size": 1,
        "ttft_ms": {"p50": 30.0},
        "itl_ms": {"p50": 10.0},
        "output_tokens_per_s": 50.0,
        "spread": 0.02,
    }
    lost = workload | {"batch_size": 8, "error": "out of memory"}
    variants = {
        "baseline": [record, record | {"batch_size": 8}],
        "candidate": [record, lost],
    }
    times = [("baseline", 1, 2.0), ("candidate", 1, 1.0), ("baseline", 8, 9.0)]
    lines = [
        json.dumps(
            {"variant": name, "batch_size": size, "repeat": n, "step_s": [drift * s / 2] * 2}
        )
        for name, size, s in times
        for n, drift in enumerate([1.0, 1.7, 1.2])
    ]
    config = BenchmarkConfig()
    with writing(tmp_path / "made", kind="benchmark", config=config, inputs={}) as draft:
        (draft.path / "benchmark.json").write_text(json.dumps({"variants": variants}))
        (draft.path / "samples.jsonl").write_text("\n".join(lines))
    return Artifact.open(tmp_path / "made")


def test_the_last_line_is_the_result_and_the_table_stands_above(
    script, measured, monkeypatch, capsys
):
    monkeypatch.setattr(script, "benchmark", lambda config, **given: measured)
    assert script.main([str(measured.path), str(measured.path)]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert list(result["variants"]) == ["baseline", "candidate"]
    assert result["hardware"]["python"]
    rows = [line for line in table if line.startswith(("| 1 |", "| 8 |"))]
    assert [line.split(" | ")[1] for line in rows] == ["baseline", "candidate"] * 2
    assert len({line.count("|") for line in rows}) == 1
    assert "out of memory" in rows[-1]


def test_the_speed_up_pairs_runs_so_that_drift_cancels(script, measured):
    speed_ups = script.compare(measured)["speed_up"]
    assert speed_ups == {"1": pytest.approx([2.0, 2.0, 2.0])}


def test_what_is_no_artifact_is_two_lines_and_code_2(script, tmp_path, capsys):
    assert script.main([str(tmp_path), str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
