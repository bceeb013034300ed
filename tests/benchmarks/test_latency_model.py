"""The script predicts what its table has not seen, and says how far off it was."""

import json
from types import SimpleNamespace

import pytest

from trt_kd.architectures.shape import read_shape
from trt_kd.latency.table import Cell
from trt_kd.stages.latency import LatencyConfig
from trt_kd.stages.twins import SOURCE, Stand


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("latency_model")


@pytest.fixture
def machine(script, monkeypatch):
    """A machine on which a layer and a weight of the MLP take their time, and unseen ones more."""

    def time(stand, shapes, config, work):
        def cell(name, shape):
            ms = 2.0 + shape.layers * (0.1 + 1e-5 * shape.hidden * shape.ffn)
            ms *= 1.1 if name.startswith("unseen") else 1.0
            times = {"p50": ms, "p90": ms, "p99": ms}
            lengths = {"input_tokens": config.input_tokens, "output_tokens": config.output_tokens}
            return [Cell(batch_size=1, **lengths, ttft_ms=times, itl_ms=times, spread=0.0)]

        everything = {SOURCE: read_shape(stand.source.path), **shapes}
        return {name: cell(name, shape) for name, shape in everything.items()}

    monkeypatch.setattr(Stand, "time", time)
    monkeypatch.setattr(script, "untested_export", lambda lane, source, out: source)


def test_the_last_line_is_the_record(script, machine, teacher, tmp_path, capsys):
    given = ["--teacher", str(teacher.path), "--work", str(tmp_path / "work"), "--lane", "onnx"]
    given += [
        "--axes",
        "ffn",
        "heads",
        "depth",
        "--unseen",
        "2",
        "--probes",
        "4",
        "--batch-sizes",
        "1",
        "--repeats",
        "1",
    ]
    assert script.main([*given, "--input-tokens", "8", "--output-tokens", "3"]) == 0
    *shown, last = capsys.readouterr().out.strip().splitlines()
    record = json.loads(last)
    assert record["lane"]["kind"] == "onnx"
    assert (record["probes"], record["unseen"]) == (4, 2)
    errors = [abs(one["error"]) for one in record["predictions"]]
    assert len(errors) == 2 * 2
    assert max(errors) == record["max_error"] >= record["median_error"]
    assert errors == pytest.approx([1 - 1 / 1.1] * 4)
    for one in record["predictions"]:
        assert one["error"] == pytest.approx(one["predicted_ms"] / one["measured_ms"] - 1)
    assert any("Largest error" in line for line in shown)


def test_what_is_unseen_is_not_in_the_table(script, teacher):
    shape = read_shape(teacher.path)
    axes = [{"kind": "ffn", "multiple_of": 8}, "depth"]
    config = LatencyConfig(axes=axes, lanes={"measured": "onnx"}, probes=4)
    known = [SimpleNamespace(sizes=one.changes(shape)) for one in config.shapes(shape)]
    seen = SimpleNamespace(shape=shape, lanes={"measured": SimpleNamespace(rows=known)})
    drawn = script.unseen(config, seen, 5)
    assert len(set(drawn)) == 5
    assert not [one for one in drawn if one.changes(shape) in [row.sizes for row in known]]


def test_a_missing_teacher_is_told_in_two_lines(script, tmp_path, capsys):
    assert script.main(["--teacher", str(tmp_path / "none"), "--work", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
