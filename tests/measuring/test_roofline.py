"""The floor follows from bytes and operations, and the measured peaks are plausible."""

import pytest

from trt_kd.measuring.machine import available_cores, load_average, peak_memory_bytes
from trt_kd.measuring.roofline import DecodeWork, Peaks, decode_floor, measure_peaks

WORK = DecodeWork(weight_bytes=4_000_000, weights=1_000_000, kv_bytes_per_token=1_000.0)


def test_a_small_batch_waits_for_memory():
    peaks = Peaks(read_bytes_per_s=4e9, flops_per_s=1e15)
    floor = decode_floor(WORK, peaks, batch_size=1, tokens=0)
    assert (floor.ms, floor.bound) == (pytest.approx(1.0), "weights")


def test_the_cache_of_every_sequence_is_read():
    peaks = Peaks(read_bytes_per_s=4e9, flops_per_s=1e15)
    floor = decode_floor(WORK, peaks, batch_size=8, tokens=500)
    assert floor.ms == pytest.approx(1.0 + 8 * 500 * 1_000 / 4e9 * 1e3)
    assert floor.bound == "weights"
    assert decode_floor(WORK, peaks, batch_size=8, tokens=501).bound == "cache"


def test_a_large_batch_waits_for_arithmetic():
    peaks = Peaks(read_bytes_per_s=1e15, flops_per_s=2e9)
    floor = decode_floor(WORK, peaks, batch_size=16, tokens=0)
    assert (floor.ms, floor.bound) == (pytest.approx(16.0), "compute")


def test_the_float32_peak_does_not_bound_quantized_products():
    peaks = Peaks(read_bytes_per_s=4e9, flops_per_s=2e9)
    packed = DecodeWork(weight_bytes=500_000, weights=1_000_000, kv_bytes_per_token=0.0)
    assert decode_floor(packed, peaks, batch_size=16, tokens=0).ms == pytest.approx(0.125)


def test_measured_peaks_are_those_of_a_computer():
    peaks = measure_peaks()
    assert 1e8 < peaks.read_bytes_per_s < 1e13
    assert 1e8 < peaks.flops_per_s < 1e14


def test_the_machine_tells_its_state():
    assert available_cores() >= 1
    assert (load_average() or 0.0) >= 0.0


def test_peak_memory_rises_with_what_is_held_and_never_falls():
    before = peak_memory_bytes()
    block = bytearray(64 << 20)
    held = peak_memory_bytes()
    del block
    assert held >= before > 1 << 20
    assert peak_memory_bytes() >= held
