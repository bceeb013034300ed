"""From a server under load to goodput in the report: recorded answers, and AIPerf where it is."""

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from trt_kd.artifacts import Artifact, writing
from trt_kd.backends.openai_server import OpenaiServer
from trt_kd.config import StageConfig, validate
from trt_kd.errors import ArtifactError
from trt_kd.reporting.details import loads, workloads
from trt_kd.stages.benchmark import BenchmarkConfig, benchmark
from trt_kd.stages.report import ReportConfig, read_report, report

HERE = Path(__file__).parent
RECORDED = HERE / "data/aiperf_0.13_sweep.json"
SIZES = (1, 2, 4, 8, 16)
SLO = {"ttft_ms": 400.0, "tpot_ms": 50.0}

REPLAY = """
import json, os, sys, time
from datetime import datetime
from pathlib import Path
import yaml
settings = yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())["benchmark"]
phase = settings["phases"][-1]
load = str(phase.get("concurrency") or f"rate {phase['rate']:g}")
out = Path(settings["artifacts"]["dir"])
out.mkdir()
recorded = json.loads(Path(os.environ["RECORDED"]).read_text())[load]
if recorded is None:
    sys.exit("connection reset by peer")
if settings["endpoint"]["url"] not in os.environ["REAL"]:
    recorded["output_token_throughput"]["avg"] *= float(os.environ["ALONE"])
if "SECONDS" in os.environ:
    recorded["start_time"] = datetime.now().isoformat()
    time.sleep(float(os.environ["SECONDS"]))
    recorded["end_time"] = datetime.now().isoformat()
(out / "profile_export_aiperf.json").write_text(json.dumps(recorded))
"""

SMI = """
import sys, time
while True:
    print("0, 250.00, 1500, 50, 1000, 0x0000000000000000", flush=True)
    if not any(a.startswith("--loop-ms") for a in sys.argv):
        break
    time.sleep(0.01)
"""


def settings(server, text_file, **options):
    tool = {"kind": "openai-server", "url": server.url, "model": "tiny", "slo": SLO}
    tool |= {"requests_per_slot": 3, "requests_at_rate": 20, "null_server": False} | options
    return validate(
        BenchmarkConfig,
        {"data": {"source": {"kind": "text", "files": [str(text_file)]}}, "repeats": 1}
        | {"batch_sizes": list(SIZES), "input_tokens": 6, "output_tokens": 8}
        | {"load_generator": tool},
        where="benchmark",
    )


def reported(made: Artifact, teacher: Artifact, out: Path, name: str = "benchmark"):
    inputs = {"teacher.model": teacher, name: made}
    return report(ReportConfig(), out=out, **inputs)


@pytest.fixture
def replay(program, monkeypatch, server):
    program("aiperf", REPLAY)
    monkeypatch.setenv("REAL", server.url)
    monkeypatch.setenv("ALONE", "5")
    monkeypatch.setenv("RECORDED", str(RECORDED))
    return monkeypatch


@pytest.fixture
def smi(program):
    program("nvidia-smi", SMI)


@pytest.fixture
def swept(replay, server, text_file, teacher, tmp_path):
    config = settings(server, text_file, request_rates=[5.0, 20.0])
    return benchmark(config, out=tmp_path / "b", teacher=teacher)


def test_recorded_loads_stand_in_the_report_with_their_goodput(swept, teacher, tmp_path):
    recorded = json.loads(RECORDED.read_text())
    found = read_report(reported(swept, teacher, tmp_path / "r").path)
    (row,) = found.variants
    assert [record.concurrency for record in row.load] == [*SIZES, None, None]
    assert [record.request_rate for record in row.load] == [None] * len(SIZES) + [5.0, 20.0]
    for record in row.load:
        told = recorded[str(record.concurrency or f"rate {record.request_rate:g}")]
        assert record.slo == SLO
        assert record.goodput_requests_per_s == told["goodput"]["avg"]
        assert record.requests_per_s == told["request_throughput"]["avg"]
        assert record.ttft_ms.p99 == told["time_to_first_token"]["p99"]
    table = loads(found)
    assert [each.cells[0].value for each in table.rows] == [
        *(f"{size} in flight" for size in SIZES), "5 requests/s", "20 requests/s"
    ]  # fmt: skip
    assert "TTFT \u2264 400 ms and TPOT \u2264 50 ms" in table.caption
    assert workloads(found).rows == []
    for each, record in zip(table.rows, row.load, strict=True):
        share = 100 * record.goodput_requests_per_s / record.requests_per_s
        assert float(each.cells[-1].value) == pytest.approx(share, abs=0.51)


def test_the_pages_show_loads_in_a_table_and_in_figures(swept, teacher, tmp_path):
    made = reported(swept, teacher, tmp_path / "r")
    page = (made.path / "report.html").read_text(encoding="utf-8")
    assert "Goodput by requests in flight" in page
    assert "Goodput by request rate" in page
    assert "Throughput against latency under load" in page
    text = (made.path / "report.md").read_text(encoding="utf-8")
    assert "## Under load" in text
    assert "16 in flight" in text
    drawn = sorted(path.name for path in swept.path.glob("*.svg"))
    assert drawn == [
        "goodput-by-request-rate.svg",
        "goodput-by-requests-in-flight.svg",
        "throughput-against-latency-under-load.svg",
    ]
    for name in drawn:
        ElementTree.fromstring((swept.path / name).read_text(encoding="utf-8"))


def test_loads_may_come_beside_a_benchmark_by_our_clock(swept, teacher, tmp_path):
    found = read_report(reported(swept, teacher, tmp_path / "r", "load.server").path)
    (row,) = found.variants
    assert row.speed == []
    assert len(row.load) == len(SIZES) + 2
    assert found.environment["python"]
    with pytest.raises(ArtifactError, match="not measured by a load generator"):
        reported(teacher_timed(teacher, tmp_path), teacher, tmp_path / "s", "load.mine")


class MadeConfig(StageConfig):
    stage = "benchmark"


def teacher_timed(teacher, tmp_path):
    content = {"schema_version": 1, "hardware": {}, "variants": {"teacher": []}}
    with writing(tmp_path / "t", kind="benchmark", config=MadeConfig(), inputs={}) as draft:
        (draft.path / "benchmark.json").write_text(json.dumps(content))
    return Artifact.open(tmp_path / "t")


def test_a_load_that_failed_is_a_note_and_the_others_stand(
    replay, server, text_file, teacher, tmp_path
):
    recorded = json.loads(RECORDED.read_text()) | {"4": None, "rate 20": None}
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(recorded))
    replay.setenv("RECORDED", str(changed))
    config = settings(server, text_file, request_rates=[5.0, 20.0])
    made = benchmark(config, out=tmp_path / "b", teacher=teacher)
    found = read_report(reported(made, teacher, tmp_path / "r").path)
    assert [record.concurrency for record in found.variants[0].load] == [1, 2, 8, 16, None]
    notes = [note for note in found.notes if "was not timed" in note]
    assert len(notes) == 2
    assert "batch size 4" in notes[0]
    assert "20 requests per second" in notes[1]


@pytest.mark.parametrize("alone", ["5", "3", "2.9"])
def test_a_client_without_headroom_is_told_and_decides_no_gate(
    replay, server, text_file, teacher, tmp_path, alone
):
    replay.setenv("ALONE", alone)
    config = settings(server, text_file, null_server=True, request_rates=[5.0])
    config = config.model_copy(update={"batch_sizes": (1, 2)})
    made = benchmark(config, out=tmp_path / "b", teacher=teacher)
    gate = {"name": "fast", "variant": "teacher", "metric": "output_tokens_per_s", "min": 1.0}
    enough = float(alone) >= 3
    asked = ReportConfig.model_validate({"gates": [gate]})
    inputs = {"teacher.model": teacher, "benchmark": made}
    found = read_report(report(asked, out=tmp_path / "r", **inputs).path)
    told = [record.client_headroom for record in found.variants[0].load]
    assert told == [pytest.approx(float(alone)), pytest.approx(float(alone)), None]
    labels = [row.detail for row in loads(found).rows]
    assert ["the client alone is only" in label for label in labels] == [not enough] * 2 + [False]
    assert ("the client alone" in found.gates[0].reason) is not enough


@pytest.mark.usefixtures("smi")
@pytest.mark.parametrize("here", [True, False])
def test_gpus_of_this_machine_stand_beside_a_load_and_those_of_another_are_not_asked(
    replay, server, text_file, teacher, tmp_path, here
):
    replay.setenv("SECONDS", "0.4")
    replay.setattr(OpenaiServer, "serves_here", lambda self: here)
    config = settings(server, text_file).model_copy(update={"batch_sizes": (4,)})
    made = benchmark(config, out=tmp_path / "b", teacher=teacher)
    found = read_report(reported(made, teacher, tmp_path / "r").path)
    (record,) = found.variants[0].load
    table = loads(found)
    assert record.served_here is here
    assert ("GPUs were not watched" in table.caption) is not here
    assert ("Power (W)" in table.columns) is here
    assert record.gpu_power_w == (250.0 if here else None)
    if here:
        assert record.energy_j_per_token == pytest.approx(250 / record.output_tokens_per_s)
    lines = (made.path / "reports.jsonl").read_text().splitlines()
    assert ["gpu" in json.loads(line) for line in lines] == [here]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("aiperf"), reason="AIPerf is not on the PATH")
def test_aiperf_sweeps_a_server_and_the_report_shows_goodput(server, text_file, teacher, tmp_path):
    config = settings(server, text_file, null_server=True)
    config = config.model_copy(update={"batch_sizes": (1, 16)})
    made = benchmark(config, out=tmp_path / "b", teacher=teacher)
    found = read_report(reported(made, teacher, tmp_path / "r").path)
    assert [record.concurrency for record in found.variants[0].load] == [1, 16]
    for record in found.variants[0].load:
        assert record.output_tokens_per_s == pytest.approx(8 * record.requests_per_s)
        assert record.client_headroom > 0
        assert 0 <= record.goodput_requests_per_s <= 1.001 * record.requests_per_s
    page = (tmp_path / "r/report.html").read_text(encoding="utf-8")
    assert "Goodput by requests in flight" in page
