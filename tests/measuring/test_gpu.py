"""What nvidia-smi tells, read from lines in its form and from a program that stands in for it."""

import os
import stat
import sys
import time

import pytest

from trt_kd.measuring.gpu import (
    GpuSample,
    GpuWatch,
    energy_j,
    gpu_record,
    gpu_use,
    mark_unequal_throttling,
    parse_sample,
)

LINES = """\
0, 71.35, 345, 33, 4, 0x0000000000000001
0, 412.80, 1980, 46, 61234, 0x0000000000000000
0, 699.12, 1605, 63, 61234, 0x0000000000000004
1, 68.02, 345, 31, 4, 0x0000000000000001
"""
"""Lines in the form of ``nvidia-smi --query-gpu=... --format=csv,noheader,nounits``."""

SMI = """
import sys, time
asked = next(a for a in sys.argv if a.startswith("--query-gpu="))
if {old} and "clocks_event_reasons" in asked:
    print("Field \\"clocks_event_reasons.active\\" is not a valid field to query.")
    sys.exit(2)
while True:
    print("0, 250.00, 1500, 50, 1000, 0x0000000000000004", flush=True)
    if not any(a.startswith("--loop-ms") for a in sys.argv):
        break
    time.sleep(0.01)
"""


@pytest.fixture
def smi(tmp_path, monkeypatch):
    def make(code):
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!{sys.executable}\n{code}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return make


def steady(watts, count=20, **changes):
    fields = {"clock_mhz": 1500.0, "temperature_c": 50.0, "memory_bytes": 1e9, "reasons": 0}
    fields |= {"index": 0} | changes
    return [GpuSample(at_s=0.1 * n, power_w=watts, **fields) for n in range(count)]


def test_lines_are_read():
    found = [parse_sample(line, 1.0) for line in LINES.splitlines()]
    assert [sample.index for sample in found] == [0, 0, 0, 1]
    assert [sample.power_w for sample in found] == [71.35, 412.8, 699.12, 68.02]
    assert found[1].clock_mhz == 1980.0
    assert found[1].memory_bytes == 61234 << 20
    assert [sample.reasons for sample in found] == [1, 0, 4, 1]


@pytest.mark.parametrize("missing", ["[N/A]", "[Not Supported]", "[Unknown Error]", ""])
def test_what_the_driver_does_not_know_is_absent_and_not_zero(missing):
    sample = parse_sample(", ".join(["0", *[missing] * 5]), 1.0)
    assert sample == GpuSample(1.0, 0, None, None, None, None, None)
    assert gpu_use([sample] * 20, 0.0, 1.0) == {"samples": 20}
    assert gpu_record([gpu_use([sample] * 20, 0.0, 1.0)] * 3, 100) == {}


@pytest.mark.parametrize("line", ["", "No devices were found", "0, 1, 2", "x, 1, 2, 3, 4, 0x0"])
def test_a_line_of_another_form_is_left_out(line):
    assert parse_sample(line, 1.0) is None


def test_energy_is_the_integral_of_power():
    power = [(0.5, 100.0), (1.0, 200.0), (2.0, 200.0)]
    by_hand = 0.5 * 100 + 0.5 * 150 + 1.0 * 200 + 1.0 * 200
    assert energy_j(power, 0.0, 3.0) == pytest.approx(by_hand)
    rising = [(t / 100, 3.0 * t / 100) for t in range(101)]
    assert energy_j(rising, 0.0, 1.0) == pytest.approx(1.5)


def test_energy_per_token_adds_up_over_gpus_and_runs():
    samples = steady(100.0) + steady(50.0, index=1)
    run = gpu_use(samples, 0.0, 2.0)
    assert run["energy_j"] == pytest.approx(300.0)
    assert run["power_w"] == pytest.approx(150.0)
    assert run["memory_bytes"] == 2_000_000_000
    found = gpu_record([run, gpu_use(samples, 0.0, 1.9)], 64)
    assert found["energy_j_per_token"] == pytest.approx((300 + 285) / 128)
    assert (found["gpu_clock_mhz"], found["gpu_temperature_c"]) == (1500.0, 50.0)


def test_a_run_shorter_than_the_driver_averages_has_no_energy():
    short = gpu_use(steady(100.0, count=4), 0.0, 0.4)
    assert "energy_j" not in short
    assert short["power_w"] == 100.0
    found = gpu_record([short, gpu_use(steady(100.0), 0.0, 2.0)], 64)
    assert "energy_j_per_token" not in found
    assert found["gpu_power_w"] == 100.0


def test_throttling_is_told_by_reason_and_idling_is_none():
    idle = gpu_use(steady(70.0, reasons=0x1), 0.0, 2.0)
    assert idle["throttled"] == {}
    hot = steady(700.0, count=10, reasons=0x24) + steady(600.0, count=10)
    assert gpu_use(hot, 0.0, 2.0)["throttled"] == {
        "power cap": 0.5, "software thermal slowdown": 0.5
    }  # fmt: skip


@pytest.mark.parametrize(("second", "steady_then"), [(0.05, True), (0.3, False)])
def test_variants_that_were_throttled_unequally_are_not_judged(second, steady_then):
    variants = [
        [{"steady": True, "gpu_throttled": {}}, {"steady": True}],
        [{"steady": True, "gpu_throttled": {"power cap": second}}, {"error": "no room"}],
    ]
    mark_unequal_throttling(variants)
    assert [records[0]["steady"] for records in variants] == [steady_then] * 2
    assert variants[0][1] == {"steady": True}


@pytest.mark.parametrize("old", [False, True])
def test_a_driver_old_or_new_is_watched_while_something_runs(smi, old):
    smi(SMI.format(old=old))
    with GpuWatch() as watch:
        start_s = watch.clock()
        end_s = start_s
        while len(watch.between(start_s, end_s)) < 3 and end_s < start_s + 20:
            time.sleep(0.02)
            end_s = watch.clock()
        samples = watch.between(start_s, end_s)
    assert len(samples) >= 3
    assert {sample.power_w for sample in samples} == {250.0}
    assert gpu_use(samples, start_s, end_s)["throttled"] == {"power cap": 1.0}


def test_where_nothing_answers_nothing_is_recorded(smi, monkeypatch, tmp_path):
    for code in ("raise SystemExit(9)", "print('No devices were found')"):
        smi(code)
        with GpuWatch() as watch:
            assert watch.between(0.0, 1e12) == []
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with GpuWatch() as watch:
        assert gpu_use(watch.between(0.0, 1e12), 0.0, 1.0) is None
    assert gpu_record([None, None], 10) == {}
