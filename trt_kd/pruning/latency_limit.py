"""What a pruned model may take on the runtime that ships: milliseconds, or a share of before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, model_validator
from typing_extensions import Self

from trt_kd.architectures.shape import ModelShape
from trt_kd.config import StrictModel
from trt_kd.latency.model import LatencyModel
from trt_kd.latency.operators import Metric
from trt_kd.latency.table import LatencyTable, Lengths, chosen_lengths

TOKEN_MS = "token_ms"
"""Milliseconds of the whole batch per output token: a thousand over the tokens per second."""


def _number(value: object) -> object:
    """Check that a limit is a number above 0, or a percentage as text."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        if value is not None and value <= 0:
            raise ValueError("a limit lies above 0")
        return value
    text = str(value).strip()
    try:
        if text.endswith("%") and float(text[:-1]) > 0:
            return text
    except ValueError:
        pass
    raise ValueError("write a number, or a percentage of the unpruned model's such as 70%")


Limit = Annotated[float | str | None, BeforeValidator(_number)]


class LatencyLimit(StrictModel):
    """Limits on time; a model fits if it keeps every one that is given.

    Percentages count from the unpruned model in ``lane``, or else in the table's first lane, so
    that they ask the same of every lane.
    """

    itl_ms: Limit = None
    """Longest inter-token latency: milliseconds, or a percentage of the unpruned model's."""
    ttft_ms: Limit = None
    """Longest time to first token, the same way."""
    tokens_per_s: Limit = None
    """Least output tokens per second of the whole batch, prefill included: a number, or a
    percentage above 100 of the unpruned model's."""
    batch: PositiveInt = 1
    """Sequences decoded together."""
    batches: Annotated[list[PositiveInt], Field(min_length=2)] | None = None
    """Instead of ``batch``, where the goal is throughput: one of these, whichever keeps the limits
    at the least divergence, the first of equals."""
    input_tokens: PositiveInt | None = None
    """Prompt tokens of every sequence (ISL) in the latency table; null where no choice is left."""
    output_tokens: PositiveInt | None = None
    """Tokens decoded for every sequence (OSL), the same way."""
    percentile: Literal[50, 90, 99] = 50
    """Percentile of both latencies."""
    lane: str | None = None
    """Lane of the latency table; null where it has one only, or to let the search choose."""
    min_speedup: float = Field(default=1.02, gt=0)
    """Candidates that are measured to be less than so many times faster are dropped."""

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if self.itl_ms is None and self.ttft_ms is None and self.tokens_per_s is None:
            raise ValueError("give at least one of itl_ms, ttft_ms and tokens_per_s")
        if share_of(self.tokens_per_s) is not None and share_of(self.tokens_per_s, 0.0) <= 1:
            raise ValueError("tokens_per_s: a percentage of the unpruned model's lies above 100%")
        return self

    @model_validator(mode="after")
    def _batches_are_comparable(self) -> Self:
        if self.batches is None:
            return self
        if self.batch != 1:
            raise ValueError("give batch or batches, not both")
        if len(set(self.batches)) < len(self.batches):
            raise ValueError("batches: a size stands twice")
        if self.tokens_per_s is None:
            raise ValueError("batches needs tokens_per_s: nothing else gains by a larger batch")
        if any(share_of(one) for one in (self.itl_ms, self.ttft_ms, self.tokens_per_s)):
            raise ValueError(
                "batches needs limits in numbers: a percentage asks something else of every size"
            )
        return self

    @property
    def choices(self) -> list[int | None]:
        """Batch sizes to choose from; None alone where there is no choice."""
        return [*self.batches] if self.batches else [None]

    def at(self, batch: int | None) -> "LatencyLimit":
        """The same at one of ``batches``; at ``batch``, which is the only one, for None."""
        return self.model_copy(update={"batch": batch or self.batch, "batches": None})

    def lengths(self, measured: Sequence[Lengths]) -> Lengths:
        """Those of ``measured`` that are meant.

        Raises:
            ConfigError: if they cannot be told, or were not measured.
        """
        return chosen_lengths(measured, self.input_tokens, self.output_tokens)


def share_of(limit: float | str | None, default: Any = None) -> Any:
    """A percentage as a share; ``default`` for a plain number or none."""
    return float(limit[:-1]) / 100 if isinstance(limit, str) else default


@dataclass(frozen=True)
class Stopwatch:
    """A limit with the latency model of one lane: absolute limits and predicted times."""

    limit: LatencyLimit
    model: LatencyModel
    lengths: Lengths
    """Those that the limit means."""
    slower: Mapping[str, float] = field(default_factory=dict)
    """By the name of a limit, how many times more than predicted the runtime turned out to take."""
    reference: LatencyModel | None = None
    """Of the lane whose unpruned model percentages count from; None for this one."""

    @property
    def lane(self) -> str:
        """Name of the lane."""
        return self.model.lane

    def limits(self) -> dict[str, float]:
        """Milliseconds at most, by name; shares count from what the unpruned model measured."""
        return _absolute(self.limit, self._measured(self.reference or self.model))

    def limits_beside(self, before: Mapping[str, float]) -> dict[str, float]:
        """Milliseconds at most where the unpruned model now takes ``before`` in this lane.

        Shares follow it, as the machine may be faster or slower than for the table.
        """
        then, limits = self.before(), self.limits()
        return {
            name: limits[name] * (before[name] / then[name] if self.is_share(name) else 1.0)
            for name in limits
        }

    def is_share(self, name: str) -> bool:
        """Whether the limit of that name was given as a percentage."""
        given = self.limit.tokens_per_s if name == TOKEN_MS else getattr(self.limit, name)
        return share_of(given) is not None

    def before(self) -> dict[str, float]:
        """Measured milliseconds of the unpruned model, by name."""
        return self._measured(self.model)

    def _measured(self, model: LatencyModel) -> dict[str, float]:
        batch = self.limit.batch
        return self._named({m: model.measured(m, batch) for m in self._metrics()})

    def values(self, shape: ModelShape) -> dict[str, Any]:
        """Predicted milliseconds of ``shape``, of numbers or arrays, by the name of every limit."""
        batch = self.limit.batch
        found = self._named({m: self.model.predict(m, shape, batch) for m in self._metrics()})
        return {name: self.slower.get(name, 1.0) * ms for name, ms in found.items()}

    def errors(self) -> dict[str, float]:
        """Median error of the predictions, as a share, by metric."""
        return {m: self.model.error(m, self.limit.batch) for m in self._metrics()}

    def _metrics(self) -> list[Metric]:
        both = self.limit.tokens_per_s is not None
        metrics: list[tuple[Metric, Any]] = [
            ("itl_ms", self.limit.itl_ms),
            ("ttft_ms", self.limit.ttft_ms),
        ]
        return [metric for metric, given in metrics if both or given is not None]

    def _named(self, ms: dict[Metric, Any]) -> dict[str, Any]:
        return costs(self.limit, ms, self.lengths.output_tokens)


def costs(limit: LatencyLimit, ms: dict[Metric, Any], output_tokens: int) -> dict[str, Any]:
    """Milliseconds by the name of every limit given; ``ms`` by metric."""
    found: dict[str, Any] = {}
    if limit.itl_ms is not None:
        found["itl_ms"] = ms["itl_ms"]
    if limit.ttft_ms is not None:
        found["ttft_ms"] = ms["ttft_ms"]
    if limit.tokens_per_s is not None:
        whole = ms["ttft_ms"] + (output_tokens - 1) * ms["itl_ms"]
        found[TOKEN_MS] = whole / (limit.batch * output_tokens)
    return found


def _absolute(limit: LatencyLimit, before: dict[str, float]) -> dict[str, float]:
    """Milliseconds at most by name, where the unpruned model took ``before``."""
    found: dict[str, float] = {}
    for name in before:
        if name == TOKEN_MS:
            given = limit.tokens_per_s
            share = share_of(given)
            found[name] = before[name] / share if share else 1000 / float(given or 1)
        else:
            given = getattr(limit, name)
            share = share_of(given)
            found[name] = before[name] * share if share else float(given)
    return found


def at_most(limit: LatencyLimit, ms: Mapping[str, float]) -> LatencyLimit:
    """``limit`` with other milliseconds, by the name of every limit given."""
    asked = {name: value for name, value in ms.items() if name != TOKEN_MS}
    if TOKEN_MS in ms:
        asked["tokens_per_s"] = 1000 / ms[TOKEN_MS]
    return limit.model_copy(update=asked)


def stopwatch(limit: LatencyLimit, table: LatencyTable, lane: str) -> Stopwatch:
    """Hold ``limit`` against the lane ``lane`` of ``table``.

    Raises:
        ConfigError: if the table has no such lane, or not one pair of the lengths that are meant.
        ModelError: if its batch sizes do not reach the limit's.
        ValueError: if the limit leaves a choice of batch sizes.
    """
    if limit.batches is not None:
        raise ValueError("one batch size at a time: see LatencyLimit.at")
    first = limit.lane or next(iter(table.lanes))
    lengths = limit.lengths(table.lengths)
    made = Stopwatch(
        limit,
        table.model(lane, limit.percentile, lengths=lengths),
        lengths,
        reference=table.model(first, limit.percentile, lengths=lengths),
    )
    made.before()
    return made
