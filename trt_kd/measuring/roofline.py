"""The least time a step can take on this CPU: shown beside what was measured.

A decoding step reads every weight once and the key-value cache of every sequence, and does two
floating point operations per weight and sequence. A prefill reads every weight once, writes the
cache of every token, and does two operations per weight and token, of the head for the last token
only; causal attention looks at half of all pairs of tokens. No implementation is faster than the
slower of the two (Williams et al. 2009, the roofline model). Quantized weights are bounded by
memory only: their products run in narrower formats than the float32 peak measured here. A model
whose weights stay in the processor's cache from one step to the next can beat the memory half.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from time import perf_counter
from typing import Literal

import numpy as np

from trt_kd.measuring.clock import Clock, measure_call
from trt_kd.measuring.machine import available_cores

_STREAM_BYTES = 256 << 20
_GEMM_SIZE = 384
_STREAM_ROUNDS = 20
_GEMM_ROUNDS = 100
_GEMM_LIMIT_S = 0.5


@dataclass(frozen=True)
class DecodeWork:
    """What one decoding step must read and compute."""

    weight_bytes: int
    """Bytes of the weights that every step reads; embedding rows picked by id do not count."""
    weights: int
    """Numbers in those weights, each used in one multiplication and one addition per sequence."""
    kv_bytes_per_token: float
    """Bytes of the key-value cache per token of one sequence."""
    head_weights: int = 0
    """Those of ``weights`` that a prefill needs for its last token only."""
    attention_channels: int = 0
    """Query channels of all layers with full attention, layers x heads x channels; 0 where not
    known, and then attention does not count."""
    window_channels: int = 0
    """The same of layers that attend to a window."""
    window: int = 0
    """Tokens of that window."""


@dataclass(frozen=True)
class Peaks:
    """What this machine reaches at best."""

    read_bytes_per_s: float
    flops_per_s: float
    """Float32 matrix products."""


Bound = Literal["weights", "cache", "compute"]
"""What a step waits for: reading its weights, reading or writing the cache, arithmetic."""


@dataclass(frozen=True)
class Floor:
    """Least time of one step, and what sets it."""

    ms: float
    bound: Bound


def decode_floor(work: DecodeWork, peaks: Peaks, *, batch_size: int, tokens: float) -> Floor:
    """Floor of one step with ``tokens`` of context in each of ``batch_size`` rows.

    Where memory sets it, ``bound`` is the larger part of what is read.
    """
    cache_bytes = batch_size * _held(work, tokens) * work.kv_bytes_per_token
    flops = 2.0 * work.weights * batch_size if _is_float32(work) else 0.0
    return _slower(work, peaks, cache_bytes, flops)


def prefill_floor(work: DecodeWork, peaks: Peaks, *, batch_size: int, tokens: int) -> Floor:
    """Floor of reading a prompt of ``tokens`` in each of ``batch_size`` rows."""
    flops = prefill_flops(work, batch_size=batch_size, tokens=tokens)
    cache_bytes = batch_size * _held(work, tokens) * work.kv_bytes_per_token
    return _slower(work, peaks, cache_bytes, flops)


def prefill_flops(work: DecodeWork, *, batch_size: int, tokens: int) -> float:
    """Float32 operations of a prefill: products with float32 weights, and attention.

    A pair of tokens costs four operations per query channel: two in its score, two in the sum of
    values.
    """
    body = work.weights - work.head_weights
    products = 2.0 * (tokens * body + work.head_weights) if _is_float32(work) else 0.0
    seen = min(tokens, work.window)
    pairs = tokens * (tokens + 1) / 2 * work.attention_channels
    pairs += (seen * (seen + 1) / 2 + (tokens - seen) * seen) * work.window_channels
    return batch_size * (products + 4.0 * pairs)


def _held(work: DecodeWork, tokens: float) -> float:
    """Tokens in the cache, the mean over layers: a window layer keeps its window."""
    if not work.window_channels:
        return tokens
    share = work.window_channels / (work.window_channels + work.attention_channels)
    return (1 - share) * tokens + share * min(tokens, work.window)


def _is_float32(work: DecodeWork) -> bool:
    return work.weight_bytes >= 4 * work.weights


def _slower(work: DecodeWork, peaks: Peaks, cache_bytes: float, flops: float) -> Floor:
    """The slower of moving bytes and computing."""
    move_s = (work.weight_bytes + cache_bytes) / peaks.read_bytes_per_s
    compute_s = flops / peaks.flops_per_s
    if compute_s > move_s:
        return Floor(1e3 * compute_s, "compute")
    return Floor(1e3 * move_s, "cache" if cache_bytes > work.weight_bytes else "weights")


@cache
def measure_peaks(threads: int | None = None) -> Peaks:
    """Measure memory and matrix peaks, in about a second.

    Memory is read by ``threads`` threads (default: one per core); the matrix product has those
    of NumPy's library. The best of many short rounds, so that other work matters little.
    """
    count = threads or available_cores()
    size = _STREAM_BYTES // 4 // count
    parts = [np.ones(size, dtype=np.float32) for _ in range(count)]
    with ThreadPoolExecutor(count) as pool:
        seconds = best_s(lambda: list(pool.map(_read_all, parts)), _STREAM_ROUNDS)
    return Peaks(read_bytes_per_s=4.0 * size * count / seconds, flops_per_s=matrix_flops_per_s())


@cache
def matrix_flops_per_s() -> float:
    """Float32 matrix rate of this machine: the best of a hundred short products.

    That takes less than a tenth of a second where nothing else runs. Other work only ever makes a
    product slower; where it slows all of them, the measurement ends after half a second.
    """
    matrix = np.ones((_GEMM_SIZE, _GEMM_SIZE), dtype=np.float32)
    return 2.0 * _GEMM_SIZE**3 / best_s(lambda: matrix @ matrix, _GEMM_ROUNDS, _GEMM_LIMIT_S)


def _read_all(part: np.ndarray) -> float:
    """Read every number once, as fast as the library can; the lock is free meanwhile."""
    return float(np.dot(part, part))


def best_s(
    call: Callable[[], object],
    rounds: int,
    limit_s: float = math.inf,
    clock: Clock = perf_counter,
) -> float:
    """Least time of so many calls in seconds; none begins after ``limit_s`` but the first."""
    times: list[float] = []
    while len(times) < rounds and sum(times) < limit_s:
        times.append(measure_call(call, clock))
    return min(times)
