"""The latency model: measured times in, times of other sizes out, each with its stated error.

For every metric and batch size the operators' times are a non-negative least-squares fit (Lawson
and Hanson 1974) of relative errors over the measured models. Its error is found by leaving one
measured model out at a time. Between measured batch sizes times are interpolated linearly; beyond
the measured sizes nothing is predicted.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_kd.architectures.shape import ModelShape
from trt_kd.errors import ModelError
from trt_kd.latency.operators import METRICS, SIZES, Metric, amounts

_SAME = 1e-9


@dataclass(frozen=True)
class Timed:
    """One measured model."""

    shape: ModelShape
    ms: Mapping[tuple[Metric, int], float]
    """Milliseconds by metric and batch size."""


@dataclass(frozen=True)
class Fit:
    """Times of the operators for one metric at one batch size."""

    metric: Metric
    batch_size: int
    ms_per_unit: Mapping[str, float]
    """By operator; one that never changed among the measured models is part of ``step``."""
    errors: tuple[float, ...]
    """By measured model: error of the prediction without it, as a share of what was measured."""
    tokens: int = 1
    """Tokens that a step works on."""

    def predict(self, shape: ModelShape) -> Any:
        """Milliseconds of ``shape``, of numbers or arrays."""
        units = amounts(shape, self.metric, self.tokens)
        return sum(ms * units[name] for name, ms in self.ms_per_unit.items())

    @property
    def median_error(self) -> float:
        """Median size of the errors."""
        return float(np.median(np.abs(self.errors)))

    @property
    def max_error(self) -> float:
        """Largest size of the errors."""
        return float(np.abs(self.errors).max())


class LatencyModel:
    """Predicts one runtime in one format, within the sizes and batch sizes that were measured."""

    def __init__(self, lane: str, timed: Sequence[Timed], *, input_tokens: int) -> None:
        """Take what was measured, the unpruned model first; ``lane`` stands in every error.

        ``input_tokens`` is the length of the prompts.

        Raises:
            ValueError: if fewer than two models were measured.
        """
        if len(timed) < 2:
            raise ValueError(
                f"a latency model needs at least two measured models, not {len(timed)}"
            )
        self.lane = lane
        self.source = timed[0].shape
        self.input_tokens = input_tokens
        self._timed = tuple(timed)
        self.batch_sizes = sorted({batch for _, batch in timed[0].ms})

    @cached_property
    def fits(self) -> dict[tuple[Metric, int], Fit]:
        """One fit per metric and batch size; a metric that was not measured has none."""
        return {
            (metric, batch): _fit(metric, batch, self._tokens(metric, batch), self._timed)
            for metric in METRICS
            for batch in self.batch_sizes
            if all((metric, batch) in one.ms for one in self._timed)
        }

    @cached_property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """Least and largest measured value of every size."""
        values = {name: [getattr(one.shape, name) for one in self._timed] for name in SIZES}
        return {name: (min(found), max(found)) for name, found in values.items()}

    def predict(self, metric: Metric, shape: ModelShape, batch_size: int) -> Any:
        """Milliseconds of ``shape``; infinite where an array's sizes were not measured.

        Raises:
            ModelError: if the batch size, or a size that is a number, is beyond what was measured.
        """
        ms = self._between(metric, batch_size, lambda fit: fit.predict(shape))
        outside = self._outside(shape)
        if np.ndim(outside) or np.ndim(ms):
            return np.where(outside, np.inf, ms)
        if outside:
            raise ModelError(
                f"{self._beyond(shape)} was not measured in the lane {self.lane}",
                hint="make the latency table anew with the axes that are cut, and further down",
            )
        return float(ms)

    def measured(self, metric: Metric, batch_size: int) -> float:
        """Milliseconds of the unpruned model itself, interpolated between batch sizes alone."""
        ms = self._timed[0].ms
        found = self._between(metric, batch_size, lambda fit: ms[metric, fit.batch_size])
        return float(found)

    def error(self, metric: Metric, batch_size: int) -> float:
        """Median error of predictions, as a share: the larger one of the batch sizes around."""
        return max(fit.median_error for fit in self._around(metric, batch_size))

    def _tokens(self, metric: Metric, batch_size: int) -> int:
        """Tokens that a step works on: a prompt of every sequence, or one token of each."""
        return batch_size * self.input_tokens if metric == "ttft_ms" else batch_size

    def _between(self, metric: Metric, batch_size: int, of: Callable[[Fit], Any]) -> Any:
        """Interpolate what ``of`` gives for the nearest batch sizes."""
        low, high = self._around(metric, batch_size)
        if low is high:
            return of(low)
        share = (batch_size - low.batch_size) / (high.batch_size - low.batch_size)
        return (1 - share) * of(low) + share * of(high)

    def _around(self, metric: Metric, batch_size: int) -> tuple[Fit, Fit]:
        """The fits of the nearest batch sizes at or below and at or above."""
        below = [batch for batch in self.batch_sizes if batch <= batch_size]
        above = [batch for batch in self.batch_sizes if batch >= batch_size]
        if not below or not above:
            known = ", ".join(map(str, self.batch_sizes))
            raise ModelError(
                f"batch size {batch_size} is beyond the latency table's {known}",
                hint="make the table anew with batch_sizes around it",
            )
        try:
            return self.fits[metric, below[-1]], self.fits[metric, above[0]]
        except KeyError as error:
            raise ModelError(
                f"the latency table of lane {self.lane} has no {metric}",
                hint="make it anew with output_tokens of at least 2",
            ) from error

    def _outside(self, shape: ModelShape) -> Any:
        found: Any = np.False_
        for name, (low, high) in self.ranges.items():
            value = getattr(shape, name)
            found = found | (value < low) | (value > high)
        return found

    def _beyond(self, shape: ModelShape) -> str:
        told = [
            f"{name} {getattr(shape, name)} (from {low} to {high})"
            for name, (low, high) in self.ranges.items()
            if not low <= getattr(shape, name) <= high
        ]
        return " and ".join(told)


def _fit(metric: Metric, batch_size: int, tokens: int, timed: Sequence[Timed]) -> Fit:
    rows = [amounts(one.shape, metric, tokens) for one in timed]
    names = _varying(rows)
    units_NK = np.array([[row[name] for name in names] for row in rows], dtype=np.float64)
    ms_N = np.array([one.ms[metric, batch_size] for one in timed], dtype=np.float64)
    errors = []
    for left_out in range(len(timed)):
        others = np.arange(len(timed)) != left_out
        ms_K = _solve(units_NK[others], ms_N[others])
        errors.append(float(units_NK[left_out] @ ms_K / ms_N[left_out] - 1))
    ms_K = _solve(units_NK, ms_N)
    ms_per_unit = dict(zip(names, ms_K.tolist(), strict=True))
    return Fit(metric, batch_size, ms_per_unit, tuple(errors), tokens)


def _varying(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """``step``, and every operator whose amount is not the same in all of the models."""
    first = rows[0]
    return [
        name
        for name in first
        if name == "step" or any(abs(row[name] - first[name]) > _SAME * first[name] for row in rows)
    ]


def _solve(units_NK: NDArray[np.float64], ms_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Non-negative times per unit with the least sum of squared relative errors."""
    from scipy.optimize import nnls

    scale_K = units_NK.max(axis=0)
    solution, _ = nnls(units_NK / scale_K / ms_N[:, None], np.ones(len(ms_N)))
    found: NDArray[np.float64] = solution / scale_K
    return found
