"""The benchmark stage: fair turns, exact lengths, records that say what they are."""

import json
import os
import sys

import numpy as np
import pytest

from trt_kd.artifacts import Artifact, writing
from trt_kd.config import StageConfig, validate
from trt_kd.errors import ArtifactError, ConfigError, DataError, ModelError
from trt_kd.stages.benchmark import BenchmarkConfig, benchmark

FAKE = '''
"""A backend that sleeps; rows of 3 do not fit in its memory, a marked prompt kills it."""
import os
import time
from pathlib import Path
from typing import Literal

from trt_kd.backends.base import Backend, Session
from trt_kd.measuring.roofline import DecodeWork


class Sleeper(Backend):
    """Sleeps as long per step as its export says."""

    kind: Literal["sleeper_backend:Sleeper"] = "sleeper_backend:Sleeper"

    def load(self, directory):
        return SleeperSession(directory)

    def on_gpu(self):
        return "SLEEPER_GPU" in os.environ

    def decode_work(self, directory):
        return DecodeWork(weight_bytes=4000, weights=1000, kv_bytes_per_token=8.0)


class SleeperSession(Session):
    vocab_size = 512

    def __init__(self, directory):
        self.step_s = float((directory / "step_s").read_text())
        self.log = Path(os.environ["SLEEPER_LOG"])

    def logits(self, tokens_BL):
        raise ValueError

    def steps(self, prompts, new_tokens):
        with self.log.open("a") as log:
            log.write(f"{self.step_s} {prompts}\\n")
        if self.step_s < 0:
            os._exit(7)
        if len(prompts) == 3:
            raise MemoryError("no room for 3")
        time.sleep(10 * self.step_s)
        if len(prompts) == 4 and self.step_s == 0.002:
            raise RuntimeError("broke off at 4")
        for _ in range(new_tokens):
            time.sleep(self.step_s)
            yield

    def close(self):
        pass
'''


class MadeConfig(StageConfig):
    stage = "export"
    lane: object
    note: float


@pytest.fixture
def sleeper(tmp_path, monkeypatch, tokenizer_dir, forked):
    """Make an export that takes ``step_s`` seconds per step."""
    (tmp_path / "sleeper_backend.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SLEEPER_LOG", str(tmp_path / "log"))

    def make(step_s):
        out = tmp_path / f"export{step_s}"
        lane = {"kind": "sleeper_backend:Sleeper", "precision": "int4"}
        config = MadeConfig(lane=lane, note=step_s)
        with writing(out, kind="export", config=config, inputs={}) as draft:
            (draft.path / "step_s").write_text(str(step_s))
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (draft.path / name).write_bytes((tokenizer_dir / name).read_bytes())
        return Artifact.open(out)

    return make


@pytest.fixture
def settings(text_file):
    def make(**changes):
        source = {"kind": "text", "files": [str(text_file)]}
        few = {"input_tokens": 8, "output_tokens": 4, "repeats": 3, "batch_sizes": [1, 2]}
        few |= {"data": {"source": source}, "warmup": 1}
        return validate(BenchmarkConfig, few | changes, where="benchmark")

    return make


def read(artifact):
    return json.loads((artifact.path / "benchmark.json").read_text())


def test_records_hold_what_the_sessions_did(sleeper, settings, tmp_path):
    variants = {"slow": sleeper(0.02), "fast": sleeper(0.005)}
    made = benchmark(settings(), out=tmp_path / "b", **variants)
    result = read(made)
    assert result["schema_version"] == 1
    assert result["hardware"]["python"]
    assert list(result["variants"]) == ["slow", "fast"]
    for name, step_ms in (("slow", 20.0), ("fast", 5.0)):
        assert [record["batch_size"] for record in result["variants"][name]] == [1, 2]
        for record in result["variants"][name]:
            assert record["backend"] == "sleeper_backend:Sleeper"
            assert record["format"] == "int4"
            assert (record["input_tokens"], record["output_tokens"]) == (8, 4)
            assert record["repeats"] == 3
            assert record["itl_ms"]["p50"] >= step_ms
            assert record["ttft_ms"]["p50"] >= 11 * step_ms
            assert record["output_tokens_per_s"] <= record["batch_size"] * 4 / (14e-3 * step_ms)
            assert record["peak_memory_bytes"] > 1 << 20
            assert record["load_s"] > 0
            assert record["steady"] == (record["spread"] <= 0.25)
            assert 0 < record["decode_floor_ms"] < step_ms
            assert record["decode_bound"] in ("weights", "cache", "compute")
            assert 0 < record["prefill_floor_ms"] < step_ms
            assert record["prefill_bound"] in ("weights", "cache", "compute")
    assert made.metrics["variants"]["slow"]["batch_1"]["itl_ms_p50"] >= 20.0
    made.verify()


def test_every_step_of_every_counted_run_is_kept(sleeper, settings, tmp_path):
    made = benchmark(settings(), out=tmp_path / "b", only=sleeper(0.001))
    lines = (made.path / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [(item["batch_size"], item["repeat"]) for item in samples] == [
        (size, repeat) for size in (1, 2) for repeat in range(3)
    ]
    assert all(len(item["step_s"]) == 4 for item in samples)
    for record, runs in zip(
        read(made)["variants"]["only"], (samples[:3], samples[3:]), strict=True
    ):
        times = 1e3 * np.array([item["step_s"] for item in runs])
        rates = record["batch_size"] * 4e3 / times.sum(1)
        assert record["ttft_ms"]["p50"] == pytest.approx(np.median(times[:, 0]))
        assert record["itl_ms"]["p90"] == pytest.approx(np.percentile(times[:, 1:], 90))
        assert record["output_tokens_per_s"] == pytest.approx(np.median(rates))
        assert record["spread"] == pytest.approx(np.ptp(rates) / 2 / np.median(rates))


SMI = """
import sys, time
while True:
    print("0, 250.00, 1500, 50, 1000, 0x0000000000000004", flush=True)
    if not any(a.startswith("--loop-ms") for a in sys.argv):
        break
    time.sleep(0.01)
"""


@pytest.mark.parametrize("on_gpu", [True, False])
def test_energy_stands_beside_what_ran_on_a_gpu_and_beside_nothing_else(
    sleeper, settings, tmp_path, monkeypatch, on_gpu
):
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{SMI}")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    if on_gpu:
        monkeypatch.setenv("SLEEPER_GPU", "1")
    made = benchmark(settings(batch_sizes=[2]), out=tmp_path / "b", only=sleeper(0.03))
    (record,) = read(made)["variants"]["only"]
    told = {name for name in record if name.startswith(("gpu_", "energy_"))}
    if not on_gpu:
        assert told == set()
        return
    assert record["gpu_throttled"] == {"power cap": 1.0}
    samples = [json.loads(x) for x in (made.path / "samples.jsonl").read_text().splitlines()]
    spent_j = 250 * sum(sum(line["step_s"]) for line in samples)
    assert record["energy_j_per_token"] == pytest.approx(spent_j / (3 * 2 * 4), rel=0.1)


def test_prompts_are_real_text_and_never_repeat(sleeper, settings, tmp_path):
    benchmark(settings(), out=tmp_path / "b", only=sleeper(0.001))
    rows = [
        tuple(row)
        for line in (tmp_path / "log").read_text().splitlines()
        for row in json.loads(line.partition(" ")[2])
    ]
    assert len(rows) == len(set(rows)) == 4 * (1 + 2)
    assert {len(row) for row in rows} == {8}


def test_a_batch_that_does_not_fit_is_recorded_and_the_rest_is_measured(
    sleeper, settings, tmp_path
):
    config = settings(batch_sizes=[1, 3, 2])
    made = benchmark(config, out=tmp_path / "b", only=sleeper(0.001))
    one, three, two = read(made)["variants"]["only"]
    assert "no room for 3" in three["error"]
    assert three["batch_size"] == 3
    assert "itl_ms" not in three
    assert one["repeats"] == two["repeats"] == 3


def test_an_unsteady_record_says_so(sleeper, settings, tmp_path):
    config = settings(spread_limit=1e-9)
    made = benchmark(config, out=tmp_path / "b", only=sleeper(0.001))
    assert [item["steady"] for item in read(made)["variants"]["only"]] == [False, False]
    assert made.metrics["steady"] is False


def test_one_output_token_has_no_time_between_tokens(sleeper, settings, tmp_path):
    config = settings(output_tokens=1, batch_sizes=[1])
    made = benchmark(config, out=tmp_path / "b", only=sleeper(0.001))
    assert read(made)["variants"]["only"][0]["itl_ms"] is None


def test_a_variant_whose_process_dies_is_named_and_nothing_is_left(sleeper, settings, tmp_path):
    with pytest.raises(ModelError, match="variant bad: its process ended with code 7") as caught:
        benchmark(settings(), out=tmp_path / "b", good=sleeper(0.001), bad=sleeper(-1.0))
    assert len(str(caught.value).splitlines()) == 2
    assert not list(tmp_path.glob("b*"))


def test_a_workload_that_fails_loses_nothing_of_the_others(sleeper, settings, tmp_path):
    config = settings(batch_sizes=[1, 4, 2])
    made = benchmark(config, out=tmp_path / "b", good=sleeper(0.001), weak=sleeper(0.002))
    one, four, two = read(made)["variants"]["weak"]
    assert "broke off at 4" in four["error"]
    assert one["repeats"] == two["repeats"] == 3
    assert [item["repeats"] for item in read(made)["variants"]["good"]] == [3, 3, 3]


def test_records_say_what_their_numbers_mean_and_how_the_machine_was(sleeper, settings, tmp_path):
    result = read(benchmark(settings(), out=tmp_path / "b", only=sleeper(0.001)))
    record = result["variants"]["only"][0]
    assert {"ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"} == set(record["intervals"])
    assert set(record["intervals"]) < set(result["definitions"])
    for name, shares in record["intervals"].items():
        assert all(low <= record[name][p] <= high for p, (low, high) in shares.items())
    assert result["conditions"]["affinity"] is None or result["conditions"]["affinity"]
    assert record["tpot_ms"]["p50"] >= 1.0
    assert record["requests_per_s"] == pytest.approx(record["output_tokens_per_s"] / 4)


def test_warm_up_goes_on_until_three_runs_agree(sleeper, settings, tmp_path):
    loose = settings(batch_sizes=[1], warmup=9, warmup_tolerance=5.0)
    (record,) = read(benchmark(loose, out=tmp_path / "a", only=sleeper(0.002)))["variants"]["only"]
    assert (record["warmup_rounds"], record["warm"]) == (3, True)
    strict = settings(batch_sizes=[1], warmup=4, warmup_tolerance=1e-9)
    (record,) = read(benchmark(strict, out=tmp_path / "b", only=sleeper(0.003)))["variants"]["only"]
    assert (record["warmup_rounds"], record["warm"]) == (4, False)


def test_a_batch_size_stands_once(settings):
    with pytest.raises(ConfigError, match="twice"):
        settings(batch_sizes=[1, 2, 1])


def test_a_rehearsal_runs_once_and_is_steady(sleeper, settings, tmp_path):
    config = settings(batch_sizes=[2, 4]).rehearsal()
    made = benchmark(config, out=tmp_path / "b", only=sleeper(0.001))
    (record,) = read(made)["variants"]["only"]
    assert (record["batch_size"], record["repeats"], record["spread"]) == (2, 1, 0.0)
    assert record["steady"]


@pytest.mark.slow
def test_a_checkpoint_is_measured_in_transformers(teacher, settings, tmp_path):
    config = settings(batch_sizes=[2], repeats=1, warmup=0, threads=1)
    made = benchmark(config, out=tmp_path / "b", teacher=teacher)
    (record,) = read(made)["variants"]["teacher"]
    assert record["backend"] == "transformers"
    assert record["itl_ms"]["p50"] > 0


def test_too_little_text_is_said_before_any_model_is_loaded(sleeper, settings, tmp_path):
    with pytest.raises(DataError, match="heldout"):
        benchmark(settings(repeats=100000), out=tmp_path / "b", only=sleeper(0.001))
    assert not (tmp_path / "log").exists()


def test_no_variant_is_an_error(settings, tmp_path):
    with pytest.raises(ConfigError, match="at least one variant"):
        benchmark(settings(), out=tmp_path / "b")


def test_a_variant_that_no_backend_runs_is_an_error(settings, tmp_path):
    config = MadeConfig(lane={"kind": "trtllm-engine"}, note=0.0)
    with writing(tmp_path / "e", kind="export", config=config, inputs={}):
        pass
    with pytest.raises(ArtifactError, match="no backend runs"):
        benchmark(settings(), out=tmp_path / "b", only=Artifact.open(tmp_path / "e"))


@pytest.mark.parametrize("sizes", [[], [0], [1, -2]])
def test_batch_sizes_must_be_positive_and_at_least_one(settings, sizes):
    with pytest.raises(ConfigError, match="batch_sizes"):
        settings(batch_sizes=sizes)


LOADER = '''
"""A load generator that needs no runtime."""
from typing import Literal

from trt_kd.backends.load import TIMES, LoadGenerator, LoadRun
from trt_kd.errors import ServerError


class Loader(LoadGenerator):
    """Tells the same of every run."""

    kind: Literal["loader_tool:Loader"] = "loader_tool:Loader"
    requests_per_slot: int = 1
    requests_at_rate: int = 2

    def check(self, targets, loads):
        pass

    def run(self, target, load, folder):
        if load.workload.batch_size == 2:
            raise ServerError("the server is gone")
        times = {name: {"p50": 5.0, "p90": 6.0, "p99": 7.0} for name in TIMES}
        rates = {"output_tokens_per_s": 10.0, "requests_per_s": 2.0}
        return LoadRun(times, rates, {"of": len(load.prompts)}, goodput_requests_per_s=1.5)
'''


@pytest.fixture
def loader(tmp_path, monkeypatch):
    (tmp_path / "loader_tool.py").write_text(LOADER)
    monkeypatch.syspath_prepend(tmp_path)
    return {"kind": "loader_tool:Loader"}


def test_a_load_generator_measures_instead_of_our_clock(sleeper, text_file, loader, tmp_path):
    config = validate(
        BenchmarkConfig,
        {"data": {"source": {"kind": "text", "files": [str(text_file)]}}, "batch_sizes": [1, 2]}
        | {"input_tokens": 4, "output_tokens": 4, "repeats": 2}
        | {"load_generator": loader | {"request_rates": [3.0]}},
        where="benchmark",
    )
    made = benchmark(config, out=tmp_path / "b", only=sleeper(0.001))
    result = read(made)
    one, two = result["variants"]["only"]
    assert (one["backend"], one["format"], one["batch_size"]) == ("loader_tool:Loader", "int4", 1)
    assert one["itl_ms"] == {"p50": 5.0, "p90": 6.0, "p99": 7.0}
    assert (one["goodput_requests_per_s"], one["repeats"], one["steady"]) == (1.5, 2, True)
    assert two["error"] == "the server is gone"
    (at_rate,) = result["request_rates"]["only"]
    assert (at_rate["request_rate"], at_rate["repeats"]) == (3.0, 2)
    assert "batch_size" not in at_rate
    reports = [json.loads(x) for x in (made.path / "reports.jsonl").read_text().splitlines()]
    assert [(x["batch_size"], x["request_rate"], x["report"]["of"]) for x in reports] == [
        (1, None, 3), (1, None, 3), (1, 3.0, 12), (1, 3.0, 12)
    ]  # fmt: skip
    assert not (made.path / "samples.jsonl").exists()


def test_a_setting_without_effect_beside_a_load_generator_is_an_error(settings, loader):
    with pytest.raises(ConfigError, match="warmup: no effect beside load_generator"):
        settings(load_generator=loader)


def test_a_sweep_over_lengths_measures_every_combination(sleeper, settings, tmp_path):
    config = settings(input_tokens=[4, 8], output_tokens=[2, 3], batch_sizes=[1, 3], repeats=2)
    made = benchmark(config, out=tmp_path / "b", only=sleeper(0.001))
    records = read(made)["variants"]["only"]
    keys = [(r["input_tokens"], r["output_tokens"], r["batch_size"]) for r in records]
    assert keys == [(i, o, b) for i in (4, 8) for o in (2, 3) for b in (1, 3)]
    assert [("error" in record) for record in records] == [False, True] * 4
    lines = (made.path / "samples.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    assert {(x["input_tokens"], x["output_tokens"], len(x["step_s"])) for x in told} == {
        (i, o, o) for i in (4, 8) for o in (2, 3)
    }
    prompts = [
        tuple(row)
        for line in (tmp_path / "log").read_text().splitlines()
        for row in json.loads(line.partition(" ")[2])
    ]
    assert {len(row) for row in prompts} == {4, 8}
    summary = made.metrics["variants"]["only"]
    assert set(summary) == {f"batch_{b}_{i}_{o}" for i, o, b in keys}


@pytest.mark.parametrize("lengths", [[], [0], [8, 8], "many"])
def test_lengths_must_be_positive_and_stand_once(settings, lengths):
    with pytest.raises(ConfigError, match="input_tokens"):
        settings(input_tokens=lengths)


def test_a_benchmark_goes_on_after_a_kill(sleeper, settings, tmp_path, monkeypatch):
    """Killed in the second workload: the first is not run again and its rows stay its own."""
    from trt_kd.backends.worker import Worker

    config, only = settings(batch_sizes=[1, 2, 4]), sleeper(0.001)
    real, killed = Worker.run, []

    def killed_at_two(self, prompts, new_tokens):
        if len(prompts) == 2 and not killed:
            killed.append(True)
            raise KeyboardInterrupt
        return real(self, prompts, new_tokens)

    monkeypatch.setattr(Worker, "run", killed_at_two)
    with pytest.raises(KeyboardInterrupt):
        benchmark(config, out=tmp_path / "b", only=only)
    before = (tmp_path / "log").read_text().splitlines()
    made = benchmark(config, out=tmp_path / "b", only=only)
    after = (tmp_path / "log").read_text().splitlines()[len(before) :]
    assert {len(json.loads(line.partition(" ")[2])) for line in after} == {2, 4}
    assert len(set(before + after)) == len(before + after)
    records = read(made)["variants"]["only"]
    assert [record["repeats"] for record in records] == [3, 3, 3]
    assert [path.name for path in tmp_path.glob("b*")] == ["b"]


def test_settings_with_a_load_generator_survive_their_own_dump(text_file, loader):
    data = {"source": {"kind": "text", "files": [str(text_file)]}}
    config = validate(BenchmarkConfig, {"data": data, "load_generator": loader}, where="benchmark")
    for kept in (config, config.rehearsal()):
        assert validate(BenchmarkConfig, kept.model_dump(mode="json"), where="again") == kept


def test_an_unknown_load_generator_lists_the_choices(settings):
    with pytest.raises(ConfigError, match="trtllm-bench, openai-server"):
        settings(load_generator="trtllm")


def test_compare_prints_the_ratio_with_its_interval(sleeper, text_file, tmp_path):
    from typer.testing import CliRunner

    from trt_kd.cli.app import app

    slow, fast = sleeper(0.02), sleeper(0.005)
    few = ["batch_sizes=[1]", "input_tokens=8", "output_tokens=4", "repeats=3", "warmup=0"]
    few.append(f"data.source={{kind: text, files: [{text_file}]}}")
    pair = ["benchmark", "--compare", str(slow.path), str(fast.path), *few]
    told = CliRunner().invoke(app, [*pair, "--json", "--out", str(tmp_path / "kept/b")])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    itl = next(each for each in found["ratios_b_to_a"] if each["metric"] == "itl_ms")
    assert itl["low"] <= itl["ratio"] <= itl["high"]
    assert itl["ratio"] < 1
    assert itl["pairs"] == 3
    assert set(found["benchmark"]["variants"]) == {"A", "B"}
    assert Artifact.open(tmp_path / "kept/b").manifest.kind == "benchmark"
    told = CliRunner().invoke(app, pair)
    assert told.exit_code == 0, told.output
    assert "B / A" in told.stdout
    for arguments, message in (
        (["benchmark", *few], "what is measured"),
        ([*pair, "--input", "a=b"], "what is measured"),
        (["benchmark", "--input", f"a={slow.path}", *few], "where to"),
    ):
        told = CliRunner().invoke(app, arguments)
        assert (told.exit_code, message in told.stderr) == (2, True)
