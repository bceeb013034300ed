"""trtllm-bench: commands under the contract, data sets, reports of both versions, its absence."""

import importlib.util
import json
import shlex
import time
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from trt_kd.backends.load import Load
from trt_kd.backends.trtllm_bench import TrtllmBench, dataset_lines, read_report
from trt_kd.backends.trtllm_container import IMAGE
from trt_kd.backends.worker import OutOfMemoryError
from trt_kd.errors import ConfigError, MissingDependencyError, ServerError
from trt_kd.measuring.clock import Workload

DATA = Path(__file__).parent / "data"
CONTRACT = Path(__file__).parents[1] / "contracts/test_trtllm.py"
VERSIONS = ["throughput_1.2.1", "latency_1.2.1", "throughput_1.3"]
FOUR = Workload(batch_size=4, input_tokens=128, output_tokens=32)
ONE = FOUR.model_copy(update={"batch_size": 1})

TOOL = """
import json, os, sys
from pathlib import Path
words = sys.argv[1:]
value = lambda name: words[words.index(name) + 1]
rows = [json.loads(line) for line in Path(value("--dataset")).read_text().splitlines()]
Path(os.environ["SEEN"]).write_text(json.dumps({"words": words, "rows": rows,
    "options": Path(value("--config")).read_text()}))
if os.environ.get("SAYS"):
    sys.exit(os.environ["SAYS"])
report = json.loads(Path(os.environ["SAMPLE"]).read_text())
report["request_info"] |= {"num_requests": len(rows), "avg_output_length": rows[0]["output_tokens"]}
Path(value("--report_json")).write_text(json.dumps(report))
"""


def sample(name):
    return json.loads((DATA / f"trtllm_bench_{name}.json").read_text())


@pytest.fixture(scope="module")
def contract():
    spec = importlib.util.spec_from_file_location("contract_of_trtllm", CONTRACT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.fixture
def engine(tmp_path):
    folder = tmp_path / "engine"
    (folder / "hf").mkdir(parents=True)
    (folder / "hf/config.json").write_text('{"model_type": "llama"}')
    (folder / "rank0.engine").write_bytes(b"")
    return folder


@pytest.fixture
def tool(program, tmp_path, monkeypatch):
    """A stand-in that answers as trtllm-bench would, and what it was given."""
    program("trtllm-bench", TOOL)
    monkeypatch.setenv("SEEN", str(tmp_path / "seen.json"))
    monkeypatch.setenv("SAMPLE", str(DATA / "trtllm_bench_throughput_1.3.json"))
    return lambda: json.loads((tmp_path / "seen.json").read_text())


def rows(count, length=4):
    return [list(range(n, n + length)) for n in range(count)]


@pytest.mark.parametrize("version", ["1.2.1", "1.3"])
@pytest.mark.parametrize("subcommand", ["throughput", "latency"])
@pytest.mark.parametrize("workload", [ONE, FOUR])
def test_every_command_is_one_that_both_versions_take(
    contract, target, tmp_path, version, subcommand, workload
):
    if subcommand == "latency" and workload is FOUR:
        pytest.skip("refused before")
    bench = TrtllmBench(subcommand=subcommand, tensor_parallel=2)
    argv = bench.command(target, Load(workload), tmp_path)
    assert contract.line_problems(argv, version) == []
    assert argv[argv.index("--concurrency") + 1] == str(workload.batch_size)


@pytest.mark.parametrize("subcommand", ["throughput", "latency"])
def test_an_engine_is_measured_by_1_2_alone(contract, engine, tmp_path, subcommand):
    bench = TrtllmBench(subcommand=subcommand)
    argv = bench.command(engine, Load(ONE), tmp_path)
    assert contract.line_problems(argv, "1.2.1") == []
    assert any("tensorrt" in problem for problem in contract.line_problems(argv, "1.3"))
    assert "--max_seq_len" not in argv
    assert bench.tokenizer_folder(engine) == engine / "hf"


def test_a_data_set_has_exact_lengths_and_no_prompt_twice():
    lines = [json.loads(line) for line in dataset_lines(rows(3), 32)]
    assert [line["task_id"] for line in lines] == [0, 1, 2]
    assert [line["input_ids"] for line in lines] == rows(3)
    assert {line["output_tokens"] for line in lines} == {32}
    with pytest.raises(ValueError, match="alike"):
        dataset_lines([[1, 2], [1, 2]], 32)


@pytest.mark.parametrize("name", VERSIONS)
def test_reports_of_every_version_and_subcommand_are_read(name):
    report = sample(name)
    run = read_report(report, requests=report["request_info"]["num_requests"], output_tokens=32)
    streaming, speed = report["streaming_metrics"], report["performance"]
    assert run.times["ttft_ms"]["p99"] == streaming["ttft_percentiles"]["p99"]
    assert run.times["tpot_ms"]["p50"] == streaming["tpot_percentiles"]["p50"]
    assert run.times["e2e_ms"]["p90"] == speed["request_latency_percentiles_ms"]["p90"]
    assert run.rates["output_tokens_per_s"] == speed["system_output_throughput_tok_s"]
    assert run.rates["input_tokens_per_s"] == pytest.approx(
        4 * speed["system_output_throughput_tok_s"]
    )
    assert run.report == report


def test_missing_fields_are_named_all_at_once_with_the_version():
    report = sample("throughput_1.3")
    del report["streaming_metrics"]["ttft_percentiles"]["p99"], report["performance"]
    with pytest.raises(ServerError, match=r"trtllm-bench 1\.3\.0rc24 lacks") as caught:
        read_report(report, requests=40, output_tokens=32)
    told = str(caught.value)
    assert "streaming_metrics.ttft_percentiles.p99" in told
    assert "performance.system_output_throughput_tok_s" in told
    assert "tpot_percentiles" not in told


@pytest.mark.parametrize(("requests", "tokens"), [(41, 32), (40, 64)])
def test_a_run_that_stopped_early_is_no_run(requests, tokens):
    with pytest.raises(ServerError, match="40 requests with 32 tokens"):
        read_report(sample("throughput_1.3"), requests=requests, output_tokens=tokens)


def test_a_run_gives_the_tool_our_rows_and_keeps_its_report(tool, target, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    bench = TrtllmBench(requests_per_slot=2)
    run = bench.run(target, Load(FOUR, prompts=rows(16)), folder)
    seen = tool()
    assert [row["input_ids"] for row in seen["rows"]] == rows(16)[8:]
    assert yaml.safe_load(seen["options"]) == {"kv_cache_config": {"enable_block_reuse": False}}
    assert run.report["engine"]["version"] == "1.3.0rc24"


def test_the_requests_ran_until_the_report_was_written(tool, target, tmp_path):
    (tmp_path / "run").mkdir()
    bench = TrtllmBench(requests_per_slot=1)
    before_s = time.time()
    start_s, end_s = bench.run(target, Load(ONE, prompts=rows(3)), tmp_path / "run").span_s
    assert before_s - 1 < end_s < time.time() + 1
    seconds = sample("throughput_1.3")["performance"]["total_latency_ms"] / 1000
    assert end_s - start_s == pytest.approx(seconds)


def test_short_memory_is_told_apart_from_other_failures(tool, target, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    load = Load(ONE, prompts=rows(12))
    monkeypatch.setenv("SAYS", "torch.OutOfMemoryError: CUDA out of memory.")
    with pytest.raises(OutOfMemoryError, match="out of memory"):
        TrtllmBench().run(target, load, folder)
    monkeypatch.setenv("SAYS", "the checkpoint has no quant_algo")
    with pytest.raises(ServerError, match="no quant_algo"):
        TrtllmBench().run(target, load, folder)


def test_where_it_is_missing_the_docker_line_runs_on_the_files_that_stay(
    contract, target, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    folder = tmp_path / "b.requests"
    folder.mkdir()
    with pytest.raises(MissingDependencyError, match="trtllm-bench is not installed") as caught:
        TrtllmBench().run(target, Load(ONE, prompts=rows(12)), folder)
    assert len(str(caught.value).splitlines()) == 2
    words = shlex.split(caught.value.hint[caught.value.hint.index("docker run") :])
    argv = words[words.index(IMAGE) + 1 :]
    for version in ("1.2.1", "1.3"):
        assert contract.line_problems(argv, version) == []
    mounted = [word.split(":")[0] for before, word in pairwise(words) if before == "-v"]
    assert mounted == [str(folder), str(target)]
    assert Path(argv[argv.index("--dataset") + 1]).is_file()
    assert Path(argv[argv.index("--config") + 1]).is_file()


@pytest.mark.parametrize(
    ("load", "options", "told"),
    [
        (Load(FOUR), {"subcommand": "latency"}, "one request in flight"),
        (Load(ONE, request_rate=5.0), {}, "no request rates"),
    ],
)
def test_loads_without_effect_are_refused(target, load, options, told):
    with pytest.raises(ConfigError, match=told):
        TrtllmBench(**options).check({"a": target}, [load])
