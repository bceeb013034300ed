"""The floor follows from bytes and operations, and the measured peaks are plausible."""

import pytest

from trt_kd.measuring.machine import available_cores, load_average, peak_memory_bytes
from trt_kd.measuring.roofline import (
    DecodeWork,
    Peaks,
    decode_floor,
    measure_peaks,
    prefill_floor,
    prefill_flops,
)

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


@pytest.mark.parametrize("tokens", [1, 3, 8, 20])
@pytest.mark.parametrize("window", [1, 4, 8])
def test_attention_of_a_prefill_counts_every_pair_that_a_token_may_look_at(tokens, window):
    seen = [(i, j) for i in range(tokens) for j in range(i + 1)]
    near = [(i, j) for i, j in seen if i - j < window]
    work = DecodeWork(
        weight_bytes=0, weights=0, kv_bytes_per_token=0.0, attention_channels=48,
        window_channels=16, window=window,
    )  # fmt: skip
    expected = 2 * 4 * (48 * len(seen) + 16 * len(near))
    assert prefill_flops(work, batch_size=2, tokens=tokens) == pytest.approx(expected)


def test_a_prefill_writes_its_cache_and_needs_the_head_once_per_row():
    work = DecodeWork(
        weight_bytes=4_000_000, weights=1_000_000, kv_bytes_per_token=1_000.0, head_weights=400_000
    )
    assert prefill_flops(work, batch_size=3, tokens=10) == 3 * 2 * (10 * 600_000 + 400_000)
    slow_memory = Peaks(read_bytes_per_s=4e9, flops_per_s=1e18)
    floor = prefill_floor(work, slow_memory, batch_size=8, tokens=600)
    assert floor.ms == pytest.approx(1.0 + 8 * 600 * 1_000 / 4e9 * 1e3)
    assert floor.bound == "cache"
    slow_cores = Peaks(read_bytes_per_s=1e18, flops_per_s=1e9)
    assert prefill_floor(work, slow_cores, batch_size=1, tokens=4).bound == "compute"


def test_a_window_layer_keeps_its_window_in_the_cache():
    work = DecodeWork(
        weight_bytes=0, weights=0, kv_bytes_per_token=1_000.0, attention_channels=30,
        window_channels=10, window=64,
    )  # fmt: skip
    peaks = Peaks(read_bytes_per_s=1e9, flops_per_s=1e15)
    for tokens, held in ((32, 32), (64, 64), (164, 0.75 * 164 + 0.25 * 64)):
        floor = decode_floor(work, peaks, batch_size=2, tokens=tokens)
        assert floor.ms == pytest.approx(2 * held * 1e-3)


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
