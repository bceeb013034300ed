"""The only file that looks at a clock while something is measured."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from time import perf_counter
from typing import Protocol

from pydantic import PositiveInt

from trt_kd.config import StrictModel

Clock = Callable[[], float]
"""Seconds since an arbitrary start; never runs backwards."""


class Workload(StrictModel):
    """What is decoded: every sequence of the batch has the same lengths."""

    batch_size: PositiveInt
    """Sequences decoded together."""
    input_tokens: PositiveInt
    """Prompt tokens of every sequence (ISL)."""
    output_tokens: PositiveInt
    """Tokens decoded for every sequence (OSL), end-of-text ignored."""


class Decoder(Protocol):
    """Anything that decodes step by step, such as a backend's session."""

    def steps(self, prompts: list[list[int]], new_tokens: int) -> Iterator[None]:
        """Yield once per finished step of the whole batch; the first includes prefill."""


def measure_steps(
    decoder: Decoder,
    prompts: list[list[int]],
    new_tokens: int,
    clock: Clock = perf_counter,
) -> list[float]:
    """Seconds of every decoding step; the first, with prefill, is the time to first token.

    Raises:
        ValueError: if the decoder does not take exactly ``new_tokens`` steps.
    """
    ticks = [clock()]
    for _ in decoder.steps(prompts, new_tokens):
        ticks.append(clock())  # noqa: PERF401 - a list built by extend would time the building
    if len(ticks) != new_tokens + 1:
        raise ValueError(f"the decoder took {len(ticks) - 1} steps instead of {new_tokens}")
    return [end - start for start, end in pairwise(ticks)]


def measure_call(call: Callable[[], object], clock: Clock = perf_counter) -> float:
    """Seconds that one call takes."""
    start = clock()
    call()
    return clock() - start
