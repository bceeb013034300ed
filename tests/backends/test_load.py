"""What every load generator shares: order, rows, failures, records."""

import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from trt_kd.artifacts import Finished
from trt_kd.backends import LOAD_GENERATORS
from trt_kd.backends.load import (
    TIMES,
    Load,
    LoadGenerator,
    LoadRun,
    Workplace,
    gpu_watch,
    load_record,
    rows_needed,
    sweep,
)
from trt_kd.backends.programs import numbers_at, run_program
from trt_kd.backends.worker import OutOfMemoryError
from trt_kd.errors import MissingDependencyError, ServerError
from trt_kd.measuring.clock import Workload
from trt_kd.measuring.gpu import GpuSample, GpuWatch
from trt_kd.measuring.metrics import DEFINITIONS

LOADS = [Workload(batch_size=size, input_tokens=4, output_tokens=2) for size in (1, 3)]


class Fake(LoadGenerator):
    """Tells what it is told to tell."""

    kind: Literal["fake"] = "fake"
    requests_per_slot: int = 2
    requests_at_rate: int = 5

    def check(self, targets, loads):
        pass

    def run(self, target, load, folder):
        assert not list(folder.iterdir())
        (folder / "left").write_text("")
        SEEN.append((target.name, load.workload.batch_size, load.request_rate, load.prompts))
        error = FAILS.get((target.name, load.workload.batch_size))
        if error:
            raise error
        times = {name: dict.fromkeys(("p50", "p90", "p99"), float(len(SEEN))) for name in TIMES}
        rates = {"output_tokens_per_s": 10.0}
        return LoadRun(times=times, rates=rates, report={"n": len(SEEN)}, span_s=(100.0, 102.0))


SEEN: list = []
FAILS: dict = {}


@pytest.fixture(autouse=True)
def fresh():
    SEEN.clear()
    FAILS.clear()


@pytest.fixture
def measure(tmp_path):
    def measure(names, repeats=2, finished=None, watch=None, **options):
        tool = Fake(**options)
        loads = tool.loads(LOADS)
        rows = np.arange(4 * rows_needed(tool, loads, repeats)).reshape(-1, 4)
        return sweep(
            tool,
            {name: Path(name) for name in names},
            dict.fromkeys(names, rows),
            loads,
            repeats=repeats,
            place=Workplace(tmp_path / "b.requests", finished, watch),
        )

    return measure


def test_variants_take_turns_on_the_same_rows_and_no_row_comes_twice(measure, tmp_path):
    measure("ab", request_rates=[5.0])
    assert [(name, size, rate) for name, size, rate, _ in SEEN] == [
        (name, size, rate) for size, rate in ((1, None), (3, None), (1, 5.0)) for name in "abba"
    ]
    rows = {name: [tuple(r) for n, _, _, p in SEEN if n == name for r in p] for name in "ab"}
    assert rows["a"] == rows["b"]
    assert len(set(rows["a"])) == len(rows["a"]) == 2 * (4 + 12 + 15)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OutOfMemoryError("no room"), ServerError("it is gone")])
def test_a_load_that_fails_is_recorded_and_the_others_are_measured(measure, error):
    FAILS["a", 3] = error
    found = measure("ab")
    one, three = found["a"]
    assert load_record(three, spread_limit=1.0) == {"error": error.args[0]}
    assert len(one.runs) == 2
    assert [len(runs.runs) for runs in found["b"]] == [2, 2]


def test_a_variant_of_which_nothing_was_measured_raises_its_first_error(measure):
    FAILS["a", 1] = ServerError("at one")
    FAILS["a", 3] = ServerError("at three")
    with pytest.raises(ServerError, match="at one"):
        measure("ab")


def test_where_the_tool_is_missing_its_files_stay(measure, tmp_path):
    FAILS["a", 1] = MissingDependencyError("no tool", hint="get it")
    with pytest.raises(MissingDependencyError):
        measure("a")
    assert (tmp_path / "b.requests/left").is_file()
    FAILS.clear()
    measure("a")
    assert not (tmp_path / "b.requests").exists()


def test_an_interruption_leaves_no_file(measure, tmp_path):
    FAILS["a", 3] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        measure("a")
    assert not list(tmp_path.iterdir())


def test_a_record_is_the_median_of_runs_with_an_interval(measure):
    record = load_record(measure("a", repeats=3)["a"][0], spread_limit=0.1)
    assert record["ttft_ms"] == {"p50": 2.0, "p90": 2.0, "p99": 2.0}
    low, high = record["intervals"]["ttft_ms"]["p50"]
    assert low < 6 ** (1 / 3) < high
    assert (record["repeats"], record["spread"], record["steady"]) == (3, 0.0, True)
    assert record["goodput_requests_per_s"] is None


def watching(watts, at_s):
    watch = GpuWatch()
    watch._samples = [GpuSample(at, 0, watts, 1500.0, 50.0, 1e9, 0x4) for at in at_s]
    return watch


def test_gpus_are_asked_for_the_time_of_the_requests_that_count_alone(measure):
    busy = watching(250.0, [100 + n / 10 for n in range(21)])
    busy._samples += watching(60.0, [90.0, 99.9, 102.1, 110.0])._samples
    runs = measure("a", watch=busy)["a"][0]
    found = load_record(runs, spread_limit=0.1)
    assert found["gpu_power_w"] == 250.0
    assert found["energy_j_per_token"] == pytest.approx(250.0 / 10.0)
    assert found["gpu_throttled"] == {"power cap": 1.0}


@pytest.mark.parametrize("watch", [None, watching(60.0, [99.0, 103.0])])
def test_where_nothing_was_watched_a_record_has_no_numbers_of_gpus(measure, watch):
    found = load_record(measure("a", watch=watch)["a"][0], spread_limit=0.1)
    assert not [name for name in found if name.startswith(("gpu_", "energy_"))]


def test_a_server_elsewhere_is_not_watched(caplog):
    class Elsewhere(Fake):
        def serves_here(self):
            return False

    with caplog.at_level("INFO"), gpu_watch(Elsewhere()) as watch:
        assert watch is None
    assert "its GPUs are not watched" in caplog.text
    with gpu_watch(Fake()) as watch:
        assert abs(watch.clock() - time.time()) < 60


@pytest.mark.parametrize("name", LOAD_GENERATORS.names())
def test_a_tools_own_meaning_is_of_a_number_that_records_hold(name):
    tool = LOAD_GENERATORS.load(name)
    assert tool.model_fields["kind"].default == name
    assert set(tool.definitions) <= set(DEFINITIONS) | {"goodput_requests_per_s"}


def test_every_missing_place_of_a_report_is_named():
    report = {"a": {"b": 1.0, "c": None}, "d": "text", "e": float("nan")}
    assert numbers_at(report, {"x": "a.b"}, "tool 1") == {"x": 1.0}
    with pytest.raises(ServerError, match=r"tool 1 lacks a\.c, d, e, f\.g"):
        numbers_at(
            report, dict(zip("vwxyz", ["a.b", "a.c", "d", "e", "f.g"], strict=True)), "tool 1"
        )


@pytest.mark.parametrize(
    ("code", "kind", "told"),
    [
        ("raise SystemExit('CUDA out of memory')", OutOfMemoryError, "code 1"),
        ("raise SystemExit(3)", ServerError, "code 3"),
        ("import time; time.sleep(60)", ServerError, "did not end within"),
    ],
)
def test_a_program_that_fails_says_how(tmp_path, code, kind, told):
    with pytest.raises(kind, match=told) as caught:
        run_program([sys.executable, "-c", code], tmp_path, 1.5 if "sleep" in code else 30.0)
    assert len(str(caught.value).splitlines()) == 2


def test_a_load_has_no_prompts_before_it_is_run():
    assert Load(LOADS[0]).prompts == ()


def test_loads_that_were_measured_before_a_kill_are_not_measured_again(measure, tmp_path):
    finished = Finished(tmp_path / "work", "key")
    measure("ab", request_rates=[5.0], finished=finished)
    first = list(SEEN)
    SEEN.clear()
    again = measure("ab", request_rates=[5.0], finished=finished)
    assert first
    assert SEEN == []
    assert [len(runs.runs) for runs in again["a"]] == [2] * len(again["a"])
    measure("ab", request_rates=[5.0], finished=Finished(tmp_path / "work", "other"))
    assert first == SEEN
