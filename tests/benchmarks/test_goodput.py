"""The script serves what it is given, on this machine only, and its report shows goodput."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "tests/backends/data/aiperf_0.13_sweep.json"
SERVING = ("fastapi", "uvicorn", "openai")

SERVER = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        listed = [name for name in os.listdir(os.environ["HF_HUB_CACHE"])]
        names = [name.removeprefix("models--").replace("--", "/") for name in listed]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": name} for name in names]}).encode())

given = dict(zip(sys.argv, sys.argv[1:]))
HTTPServer((given["--host"], int(given["--port"])), Handler).serve_forever()
"""
REPLAY = """
import json, os, sys
from pathlib import Path
import yaml
settings = yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())["benchmark"]
assert settings["endpoint"]["url"].startswith("http://127.0.0.1:")
assert "ignore_eos" not in settings["endpoint"]["extra"]
out = Path(settings["artifacts"]["dir"])
out.mkdir()
recorded = json.loads(Path(os.environ["RECORDED"]).read_text())
load = str(settings["phases"][-1]["concurrency"])
(out / "profile_export_aiperf.json").write_text(json.dumps(recorded[load]))
"""


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("goodput")


@pytest.fixture
def program(tmp_path):
    """Make a Python program of that name; return its path."""

    def make(name: str, code: str) -> Path:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!{sys.executable}\n{code}")
        path.chmod(0o755)
        return path

    return make


@pytest.fixture
def run(script, teacher, text_file, tmp_path, capsys):
    """Run the script on the tiny teacher; its exit code and what it printed."""
    data = {"source": {"kind": "text", "files": [str(text_file)]}}
    sizes = ["--input-tokens", "6", "--output-tokens", "8", "--requests-per-slot", "3"]
    common = [str(teacher.path), "--work", str(tmp_path / "work"), "--data", json.dumps(data)]

    def call(*arguments: str):
        code = script.main([*common, *sizes, "--repeats", "1", "--in-flight", "1", "2", *arguments])
        return code, capsys.readouterr()

    return call


def test_the_cache_holds_links_to_what_a_server_reads(script, teacher, tmp_path):
    for _ in range(2):
        hub = script.laid_out(teacher.path, tmp_path / "hub")
    revision = (hub / "models--local--student/refs/main").read_text()
    snapshot = hub / "models--local--student/snapshots" / revision
    names = {path.name for path in snapshot.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    links = [path for path in snapshot.iterdir() if path.name != "generation_config.json"]
    assert all(path.resolve() == (teacher.path / path.name).resolve() for path in links)
    settings = json.loads((snapshot / "generation_config.json").read_text())
    given = json.loads((teacher.path / "generation_config.json").read_text())
    assert settings == given | {"eos_token_id": -1}


def test_goodput_stands_in_the_table_the_record_and_the_report(run, program, tmp_path, monkeypatch):
    python = program("served", SERVER)
    monkeypatch.setenv("PATH", str(program("aiperf", REPLAY).parent), prepend=":")
    monkeypatch.setenv("RECORDED", str(RECORDED))
    arguments = ("--python", str(python), "--slo", "ttft_ms=400", "tpot_ms=50")
    code, printed = run(*arguments)
    assert code == 0, printed.err
    record = json.loads(printed.out.splitlines()[-1])
    recorded = json.loads(RECORDED.read_text())
    assert [one["concurrency"] for one in record["loads"]] == [1, 2]
    for one in record["loads"]:
        told = recorded[str(one["concurrency"])]
        assert one["goodput_requests_per_s"] == told["goodput"]["avg"]
    assert record["load_generator"]["slo"] == {"ttft_ms": 400.0, "tpot_ms": 50.0, "e2e_ms": None}
    assert "url" not in record["load_generator"]
    page = (tmp_path / "work/report/report.html").read_text(encoding="utf-8")
    assert "Goodput by requests in flight" in page
    python.write_text("#!/bin/false")  # what was measured is not measured again
    again, printed = run(*arguments)
    assert again == 0
    assert json.loads(printed.out.splitlines()[-1])["loads"] == record["loads"]


def test_a_server_that_ends_at_once_says_why(run, program):
    python = program("served", "import sys; sys.exit('Please install the serving dependencies')")
    code, printed = run("--python", str(python))
    assert code == 2
    assert "the server ended at once: Please install the serving dependencies" in printed.err
    assert "transformers[serving]" in printed.err


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("aiperf") or not all(map(importlib.util.find_spec, SERVING)),
    reason="needs AIPerf on the PATH and transformers[serving]",
)
def test_aiperf_loads_transformers_own_server(run, tmp_path):
    code, printed = run("--slo", "ttft_ms=60000")
    assert code == 0, printed.err + (tmp_path / "work/server.log").read_text(encoding="utf-8")
    record = json.loads(printed.out.splitlines()[-1])
    for one in record["loads"]:
        assert one["output_tokens_per_s"] == pytest.approx(8 * one["requests_per_s"], rel=0.01)
        assert one["goodput_requests_per_s"] == pytest.approx(one["requests_per_s"], rel=0.01)
