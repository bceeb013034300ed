"""The part of ``report.json`` that tells how the student was trained."""

from typing import Annotated

from pydantic import Field, model_validator
from typing_extensions import Self

from trt_kd.reporting.record import Record


class Curve(Record):
    """One value over the steps; of a long run means of neighbouring steps."""

    name: str
    """What it is; nats per token unless it is a feature loss."""
    steps: Annotated[list[int], Field(min_length=1)]
    """Steps, ascending; 0 is before training."""
    values: list[float]
    """Its value at each of them."""

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if len(self.steps) != len(self.values):
            raise ValueError(f"{len(self.steps)} steps and {len(self.values)} values")
        return self


class RaisedAlarm(Record):
    """An alarm that the training raised."""

    name: str
    """Its name, as in ``stop_on``."""
    step: int
    """Step at which it was raised first."""
    says: str
    """What was seen."""
    advice: str
    """What the literature advises."""


class Training(Record):
    """How the student was trained."""

    steps: int | None = None
    """Optimizer steps."""
    tokens: int | None = None
    """Training tokens read."""
    monitor_s: float | None = None
    """Seconds that the measurements on held-out text took, beside the training."""
    curves: list[Curve] = []
    """Losses by step and measurements on held-out text."""
    alarms: list[RaisedAlarm] = []
    """Alarms that were raised."""
    missing: list[str] = []
    """What is left out of how the student was trained and why, a sentence each."""
