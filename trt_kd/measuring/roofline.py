"""The least time a decoding step can take on this CPU: shown beside what was measured.

A step reads every weight once and the key-value cache of every sequence, and does two floating
point operations per weight and sequence. No implementation is faster than the slower of the two
(Williams et al. 2009, the roofline model). Quantized weights are bounded by memory only: their
products run in narrower formats than the float32 peak measured here. A model whose weights stay
in the processor's cache from one step to the next can beat the memory half.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from trt_kd.measuring.clock import measure_call
from trt_kd.measuring.machine import available_cores

_STREAM_BYTES = 256 << 20
_GEMM_SIZE = 384
_STREAM_ROUNDS = 20
_GEMM_ROUNDS = 100


@dataclass(frozen=True)
class DecodeWork:
    """What one decoding step must read and compute."""

    weight_bytes: int
    """Bytes of the weights that every step reads; embedding rows picked by id do not count."""
    weights: int
    """Numbers in those weights, each used in one multiplication and one addition per sequence."""
    kv_bytes_per_token: float
    """Bytes of the key-value cache per token of one sequence."""


@dataclass(frozen=True)
class Peaks:
    """What this machine reaches at best."""

    read_bytes_per_s: float
    flops_per_s: float
    """Float32 matrix products."""


Bound = Literal["weights", "cache", "compute"]
"""What a step waits for: reading its weights, reading the key-value cache, arithmetic."""


@dataclass(frozen=True)
class Floor:
    """Least time of one step, and what sets it."""

    ms: float
    bound: Bound


def decode_floor(work: DecodeWork, peaks: Peaks, *, batch_size: int, tokens: float) -> Floor:
    """Floor of one step with ``tokens`` of context in each of ``batch_size`` rows.

    Where memory sets it, ``bound`` is the larger part of what is read.
    """
    cache_bytes = batch_size * tokens * work.kv_bytes_per_token
    read_s = (work.weight_bytes + cache_bytes) / peaks.read_bytes_per_s
    float32 = work.weight_bytes >= 4 * work.weights
    compute_s = 2.0 * work.weights * batch_size / peaks.flops_per_s if float32 else 0.0
    if compute_s > read_s:
        return Floor(1e3 * compute_s, "compute")
    return Floor(1e3 * read_s, "cache" if cache_bytes > work.weight_bytes else "weights")


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
        seconds = _best(lambda: list(pool.map(_read_all, parts)), _STREAM_ROUNDS)
    matrix = np.ones((_GEMM_SIZE, _GEMM_SIZE), dtype=np.float32)
    product = _best(lambda: matrix @ matrix, _GEMM_ROUNDS)
    return Peaks(
        read_bytes_per_s=4.0 * size * count / seconds,
        flops_per_s=2.0 * _GEMM_SIZE**3 / product,
    )


def _read_all(part: np.ndarray) -> float:
    """Read every number once, as fast as the library can; the lock is free meanwhile."""
    return float(np.dot(part, part))


def _best(call: Callable[[], object], rounds: int) -> float:
    return min(measure_call(call) for _ in range(rounds))
