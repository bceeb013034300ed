"""Gates: limits that decide release, checked when the recipe is read.

What a gate looks at and how it decides: ``verdicts.py``.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Literal

from pydantic import Field, PositiveInt, field_validator, model_validator
from typing_extensions import Self

from trt_kd.config import StrictModel
from trt_kd.reporting.model import Role

Compare = Literal["value", "ratio", "difference"]

EXACT = ("parameters", "parameters_share", "size_bytes")
QUALITY = ("kl_to_teacher_nats", "top1_agreement", "perplexity", "loss_nats_per_token")
PERCENTILE = ("ttft_ms", "itl_ms")
SPEED = (*PERCENTILE, "output_tokens_per_s", "peak_memory_bytes")
TASK = re.compile(r"tasks\.(?P<name>.+)\.accuracy")
CHOICES = (*EXACT, *QUALITY, *SPEED, "tasks.NAME.accuracy")


class Gate(StrictModel):
    """One limit on one number, or on its ratio to or difference from another variant's.

    A gate passes when the whole 95 % interval is on the right side of the limit, fails when it
    is wholly on the wrong side, and is undecided otherwise. ``min: -0.02`` on a difference in
    accuracy is a non-inferiority test with a margin of two points.
    """

    name: str = Field(min_length=1)
    """What the gate asks for, in words."""
    variant: Role
    """Role of the row it judges."""
    metric: str
    """Dotted path below the row: size, quality, ``tasks.NAME.accuracy`` or speed."""
    relative_to: Role | None = None
    """Role of the row it is compared with; none judges the number itself."""
    compare: Compare | None = None
    """Ratio to or difference from the other row. Left out: the difference for accuracy and
    agreement, the ratio for all else, the value itself where there is no other row."""
    max: float | None = None
    """The number may be at most this."""
    min: float | None = None
    """The number must be at least this; give one of the two limits."""
    batch_size: PositiveInt | None = None
    """Speed only: the batch size that is judged; 1 where left out."""
    input_tokens: PositiveInt | None = None
    """Speed only: the prompt length, where several were measured."""
    output_tokens: PositiveInt | None = None
    """Speed only: the output length, where several were measured."""
    percentile: Literal["p50", "p90", "p99"] | None = None
    """``ttft_ms`` and ``itl_ms`` only: the percentile that is judged; p50 where left out."""

    @field_validator("metric")
    @classmethod
    def _metric_is_known(cls, metric: str) -> str:
        if metric in CHOICES[:-1] or TASK.fullmatch(metric):
            return metric
        close = get_close_matches(metric, CHOICES, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown metric; available: {', '.join(CHOICES)}{hint}")

    @model_validator(mode="after")
    def _limits_and_options_fit(self) -> Self:
        if (self.max is None) == (self.min is None):
            raise ValueError(f"gate {self.name!r}: give either max or min")
        if self.relative_to == self.variant:
            raise ValueError(f"gate {self.name!r}: compares {self.variant!r} with itself")
        if self.compare is not None and (self.compare == "value") != (self.relative_to is None):
            raise ValueError(
                f"gate {self.name!r}: compare: {self.compare} "
                + ("needs" if self.relative_to is None else "excludes")
                + " relative_to"
            )
        if self.metric == "parameters_share" and self.relative_to is not None:
            raise ValueError(
                f"gate {self.name!r}: parameters_share is a ratio to the baseline already; "
                "use parameters with relative_to"
            )
        for option in ("batch_size", "input_tokens", "output_tokens"):
            if getattr(self, option) is not None and self.metric not in SPEED:
                raise ValueError(f"gate {self.name!r}: {option} has no effect on {self.metric}")
        if self.percentile is not None and self.metric not in PERCENTILE:
            raise ValueError(f"gate {self.name!r}: percentile has no effect on {self.metric}")
        return self

    @property
    def mode(self) -> Compare:
        """How the number is compared, after the default."""
        if self.compare is not None:
            return self.compare
        if self.relative_to is None:
            return "value"
        share = self.task is not None or self.metric == "top1_agreement"
        return "difference" if share else "ratio"

    @property
    def limit(self) -> float:
        """The limit, whichever side it is on."""
        return self.max if self.max is not None else self.min or 0.0

    @property
    def task(self) -> str | None:
        """Name of the task whose accuracy is judged, or None."""
        found = TASK.fullmatch(self.metric)
        return found["name"] if found else None

    @property
    def roles(self) -> list[Role]:
        """The rows this gate needs."""
        return [self.variant] if self.relative_to is None else [self.variant, self.relative_to]


def unmet_needs(gates: Iterable[Gate], *, roles: Iterable[str], tasks: Iterable[str]) -> list[str]:
    """What ``gates`` ask for that a run with these rows and tasks will never measure.

    For plans: a gate that names a missing row or task would stay undecided for ever.
    """
    roles, tasks = list(roles), list(tasks)
    problems = []
    for index, gate in enumerate(gates):
        problems += [
            f"gates.{index}: this run has no variant {role!r}; it has {', '.join(roles)}"
            for role in gate.roles
            if role not in roles
        ]
        if gate.task is not None and gate.task not in tasks:
            known = ", ".join(tasks) or "none"
            problems.append(f"gates.{index}: no task {gate.task!r} is evaluated; tasks: {known}")
    return problems
