"""A server under load: AIPerf's settings and report, errors, and AIPerf itself where it is."""

import json
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from trt_kd.backends.load import Load, Workplace, load_record, rows_needed, sweep
from trt_kd.backends.openai_server import OpenaiServer, Slo, read_report
from trt_kd.config import validate
from trt_kd.errors import ConfigError, MissingDependencyError, ServerError
from trt_kd.measuring.clock import Workload

HERE = Path(__file__).parent
SAMPLE = HERE / "data/aiperf_0.13.json"
TWO = Workload(batch_size=2, input_tokens=6, output_tokens=8)

TOOL = """
import json, os, sys
from pathlib import Path
import yaml
settings = yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())["benchmark"]
out = Path(settings["artifacts"]["dir"])
out.mkdir()
report = json.loads(Path(os.environ["SAMPLE"]).read_text())
report["request_count"]["avg"] = float(settings["phases"][-1]["requests"])
change = json.loads(os.environ.get("CHANGE", "{}"))
(out / "profile_export_aiperf.json").write_text(json.dumps(report | change))
sys.exit(os.environ.get("SAYS"))
"""


@pytest.fixture
def tool(program, monkeypatch):
    program("aiperf", TOOL)
    monkeypatch.setenv("SAMPLE", str(SAMPLE))
    return monkeypatch


def made(url="http://127.0.0.1:1/v1", **options):
    value = {"kind": "openai-server", "url": url, "model": "tiny"} | options
    return validate(OpenaiServer, value, where="load_generator")


def rows(count, seed=0):
    return np.random.default_rng(seed).integers(1, 512, (count, TWO.input_tokens))


def run(generator, target, folder, load=TWO):
    folder.mkdir()
    count = generator.warmup(Load(load)) + generator.requests(Load(load))
    return generator.run(target, Load(load, prompts=rows(count).tolist()), folder)


def test_the_settings_ask_for_exact_lengths_and_poisson_arrivals(tmp_path):
    generator = made(slo={"ttft_ms": 500, "tpot_ms": 50}, requests_per_slot=3, requests_at_rate=7)
    settings = generator.settings(tmp_path, Load(TWO), tmp_path)["benchmark"]
    endpoint = settings["endpoint"]
    assert (endpoint["url"], endpoint["path"]) == ("http://127.0.0.1:1", "/v1/completions")
    assert endpoint["extra"] == {"ignore_eos": True, "min_tokens": 8, "temperature": 0}
    assert [phase["requests"] for phase in settings["phases"]] == [4, 6]
    assert {phase["concurrency"] for phase in settings["phases"]} == {2}
    assert settings["slos"] == {"time_to_first_token": 500.0, "inter_token_latency": 50.0}
    at_rate = generator.settings(tmp_path, Load(TWO, request_rate=2.5), tmp_path)["benchmark"]
    assert [phase["type"] for phase in at_rate["phases"]] == ["poisson", "poisson"]
    assert at_rate["phases"][-1] == {
        "name": "profiling", "type": "poisson", "rate": 2.5, "requests": 7
    }  # fmt: skip


def test_natural_lengths_ask_for_nothing_special(tmp_path):
    settings = made(length="natural", endpoint="chat").settings(tmp_path, Load(TWO), tmp_path)
    assert settings["benchmark"]["endpoint"]["extra"] == {"temperature": 0}
    assert settings["benchmark"]["endpoint"]["path"] == "/v1/chat/completions"


def test_a_key_stands_neither_in_settings_nor_in_the_artifact(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sesame")
    generator = made(key_env="MY_KEY")
    told = json.dumps(generator.settings(tmp_path, Load(TWO), tmp_path))
    assert "${MY_KEY}" in told
    assert "sesame" not in told
    assert set(generator.model_dump()) & {"url", "key_env"} == set()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"url": "127.0.0.1:8000"}, "http://HOST:PORT"),
        ({"url": "http://me:secret@host/v1"}, "holds no key"),
        ({"slo": {}}, "at least one of"),
        ({"model": ""}, "model"),
    ],
)
def test_wrong_settings_are_told(options, told):
    with pytest.raises(ConfigError, match=told):
        made(**options)


def test_a_report_is_read_and_keeps_no_address():
    report = json.loads(SAMPLE.read_text())
    found = read_report(report, requests=8, output_tokens=8)
    assert found.times["ttft_ms"]["p50"] == report["time_to_first_token"]["p50"]
    assert found.times["itl_ms"]["p90"] == report["inter_chunk_latency"]["p90"]
    assert found.times["tpot_ms"]["p99"] == report["inter_token_latency"]["p99"]
    assert found.rates["output_tokens_per_s"] == report["output_token_throughput"]["avg"]
    assert found.rates["input_tokens_per_s"] == pytest.approx(11 * found.rates["requests_per_s"])
    assert found.goodput_requests_per_s == report["goodput"]["avg"]
    kept = json.dumps(found.report)
    assert "sesame" not in kept
    assert "somewhere" not in kept


def test_a_report_says_when_its_requests_ran():
    report = json.loads(SAMPLE.read_text())
    assert read_report(report, requests=8, output_tokens=8).span_s is None
    report |= {"start_time": "2026-11-22T15:19:00.942459", "end_time": "2026-11-22T15:19:03.357090"}
    start_s, end_s = read_report(report, requests=8, output_tokens=8).span_s
    assert end_s - start_s == pytest.approx(2.414631)
    assert start_s == pytest.approx(
        time.mktime((2026, 11, 22, 15, 19, 0, 0, 0, -1)) + 0.942459, abs=1e-5
    )


@pytest.mark.parametrize(
    ("host", "here"),
    [("127.0.0.1", True), ("localhost", True), ("192.0.2.1", False), ("no.such.invalid", False)],
)
def test_a_server_is_here_if_its_address_is_this_machines(host, here):
    assert made(f"http://{host}:8000/v1").serves_here() is here


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"error_summary": [{"count": 3, "message": "HTTP 500"}]}, "requests failed.*HTTP 500"),
        ({"request_throughput": {}, "goodput": None}, r"0\.13\.0 lacks request_throughput\.avg"),
        ({"output_sequence_length": {"avg": 5.0}}, "5 tokens, not 8"),
        ({"request_count": {"avg": 7.0}}, "counted 7 answers, not 8"),
    ],
)
def test_what_is_not_what_was_asked_is_an_error(change, told):
    report = json.loads(SAMPLE.read_text()) | change
    with pytest.raises(ServerError, match=told):
        read_report(report, requests=8, output_tokens=8)


def test_answers_that_came_all_at_once_have_no_rate_per_user():
    report = json.loads(SAMPLE.read_text())
    del report["output_token_throughput_per_user"]
    assert read_report(report, requests=8, output_tokens=8).rates["tokens_per_s_per_user"] is None


def test_natural_lengths_may_be_shorter():
    report = json.loads(SAMPLE.read_text()) | {"output_sequence_length": {"avg": 5.0}}
    assert read_report(report, requests=8, output_tokens=None)


def test_a_run_hands_over_text_and_lengths(tool, teacher, tmp_path):
    found = run(made(requests_per_slot=4), teacher.path, tmp_path / "run")
    lines = (tmp_path / "run/prompts.jsonl").read_text().splitlines()
    assert len(lines) == 4 + 8
    assert {json.loads(line)["output_length"] for line in lines} == {8}
    assert found.report["aiperf_version"] == "0.13.0"
    settings = yaml.safe_load((tmp_path / "run/aiperf.yaml").read_text())
    assert settings["benchmark"]["tokenizer"]["name"] == str(teacher.path.resolve())


def test_a_server_that_goes_loses_no_load_that_was_measured(tool, teacher, tmp_path):
    """The second of three loads fails; both others are in the record."""
    generator = made(requests_per_slot=1, request_rates=[9.0], requests_at_rate=4)
    loads = generator.loads([TWO, TWO.model_copy(update={"batch_size": 3})])
    prompts = {"a": rows(rows_needed(generator, loads, 1))}
    real = OpenaiServer.run

    def failing(self, target, load, folder):
        if load.workload.batch_size == 3:
            tool.setenv("SAYS", "connection reset by peer")
        else:
            tool.delenv("SAYS", raising=False)
        return real(self, target, load, folder)

    tool.setattr(OpenaiServer, "run", failing)
    found = sweep(
        generator, {"a": teacher.path}, prompts, loads, repeats=1, place=Workplace(tmp_path / "f")
    )["a"]
    assert [runs.error is None for runs in found] == [True, False, True]
    assert "connection reset" in load_record(found[1], spread_limit=1.0)["error"]


def test_without_aiperf_two_lines_say_how_to_get_it(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match="aiperf is not installed") as caught:
        made().check({"a": teacher.path}, [])
    assert len(str(caught.value).splitlines()) == 2


def test_a_server_that_is_down_is_told_before_anything_runs(tool, teacher):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ServerError, match="does not answer") as caught:
        made(url).check({"a": teacher.path}, [])
    assert len(str(caught.value).splitlines()) == 2


def test_a_wrong_model_name_is_told_with_the_right_ones(tool, teacher, server):
    made(server.url).check({"a": teacher.path}, [])
    with pytest.raises(ServerError, match="no model 'big'") as caught:
        made(server.url, model="big").check({"a": teacher.path}, [])
    assert "tiny" in caught.value.hint


def test_an_unset_key_and_two_variants_are_refused(tool, teacher, server, monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ConfigError, match="MY_KEY is not set"):
        made(server.url, key_env="MY_KEY").check({"a": teacher.path}, [])
    with pytest.raises(ConfigError, match="serves one variant, this benchmark has 2"):
        made(server.url).check({"a": teacher.path, "b": teacher.path}, [])


def test_limits_name_what_a_good_request_meets():
    assert Slo(e2e_ms=5).model_dump(exclude_none=True) == {"e2e_ms": 5.0}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("aiperf"), reason="AIPerf is not on the PATH")
def test_aiperf_drives_a_server_of_a_tiny_model(teacher, server, tmp_path):
    generator = made(server.url, requests_per_slot=3, slo={"ttft_ms": 60_000})
    generator.check({"a": teacher.path}, [])
    found = run(generator, teacher.path, tmp_path / "run")
    assert found.times["ttft_ms"]["p50"] > 0
    assert found.rates["output_tokens_per_s"] == pytest.approx(8 * found.rates["requests_per_s"])
    assert found.goodput_requests_per_s == pytest.approx(found.rates["requests_per_s"])
    sent = [body["prompt"] for body in server.bodies]
    assert len(sent) == 4 + 6
    assert len(set(sent)) == len(sent)
    assert {body["max_tokens"] for body in server.bodies} == {8}
    server.stops_after = 5
    with pytest.raises(ServerError, match="answers had 5 tokens, not 8"):
        run(generator, teacher.path, tmp_path / "short")
