"""Weights of the objective's terms as functions of the step, without state.

A resumed run asks for the same step and gets the same weight.
"""

import math
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveInt, model_validator
from typing_extensions import Self

from trt_kd.config import StrictModel


class WeightSchedule(StrictModel):
    """A weight that moves from ``start`` to ``end`` and stays there."""

    kind: Literal["warmup", "linear", "cosine"]
    """``warmup``: from one part of ``end`` to all of it in equal parts; ``linear``: a ramp;
    ``cosine``: half a cosine, flat at both ends."""
    start: NonNegativeFloat | None = None
    """Weight of the first step, 0 if left out; ``warmup`` has none."""
    end: NonNegativeFloat
    """Weight from the last step of the way on."""
    steps: PositiveInt | None = None
    """Steps of the way; without it and ``share`` the whole run."""
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    """The same as a share of the run's steps."""

    @model_validator(mode="after")
    def _moves(self) -> Self:
        if self.steps is not None and self.share is not None:
            raise ValueError("steps and share both say how long the way is: give one")
        if self.kind == "warmup" and self.start is not None:
            raise ValueError("start has no effect: a warmup rises from zero")
        if self.kind != "warmup" and self.steps == 1:
            raise ValueError("a ramp has a first and a last step: steps must be at least 2")
        if self.end == (self.start or 0.0):
            raise ValueError(f"start and end are both {self.end:g}: write the plain number")
        return self

    def at(self, step: int, total: int) -> float:
        """Weight of ``step``, counted from 0, in a run of ``total`` steps.

        Raises:
            ValueError: if there is no such step.
        """
        if not 0 <= step < total:
            raise ValueError(f"step {step} is none of 0 to {total - 1}")
        way = self.steps or math.ceil((self.share or 1.0) * total)
        if self.kind == "warmup":
            return self.end * min(1.0, (step + 1) / way)
        done = min(1.0, step / max(1, way - 1))
        if self.kind == "cosine":
            done = (1.0 - math.cos(math.pi * done)) / 2
        start = self.start or 0.0
        return self.end if done == 1.0 else start + (self.end - start) * done


def _constant(value: object) -> object:
    """Turn ``{kind: constant, end: 0.5}`` into the plain number: one way to say one thing."""
    if isinstance(value, dict) and value.get("kind") == "constant":
        if set(value) != {"kind", "end"}:
            raise ValueError("a constant weight has nothing but its value: write the plain number")
        return value["end"]
    return value


Weight: TypeAlias = Annotated[
    NonNegativeFloat | WeightSchedule, Field(union_mode="left_to_right"), BeforeValidator(_constant)
]
"""A plain number, or a schedule over the steps."""


def weight_at(weight: "float | WeightSchedule", step: int, total: int) -> float:
    """Weight of ``step``, counted from 0, in a run of ``total`` steps."""
    return weight.at(step, total) if isinstance(weight, WeightSchedule) else weight


def peak(weight: "float | WeightSchedule") -> float:
    """Largest value that the weight takes; 0 where the term is never used."""
    return max(weight.start or 0.0, weight.end) if isinstance(weight, WeightSchedule) else weight


def over_whole_run(weight: "float | WeightSchedule") -> "float | WeightSchedule":
    """The same way over a whole run, however short: for rehearsals."""
    if not isinstance(weight, WeightSchedule):
        return weight
    return weight.model_copy(update={"steps": None, "share": None})


def step_without_term(weights: "list[float | WeightSchedule]", total: int) -> int | None:
    """A step at which every weight is zero, or None.

    A schedule is zero at its first step, or from its last one on, so that these two tell.
    """
    ends = (0, total - 1)
    return next(
        (step for step in ends if not any(weight_at(w, step, total) for w in weights)), None
    )
