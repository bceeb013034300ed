"""What a pruned model may cost: parameters, and memory at the precision it is deployed in.

``params``, ``active_params`` and ``memory_mb`` mean what they mean to ModelOpt's ``mcore_minitron``
(memory is weights and key-value cache, in MB of 1024^2 bytes), with two differences: a share or a
percentage stands for a count, and memory is that of the deployed format, not two bytes for each
parameter. All closed forms hold for shapes of numbers and for shapes of arrays alike.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from trt_kd.architectures.shape import ModelShape
from trt_kd.config import StrictModel
from trt_kd.errors import ConfigError, ModelError
from trt_kd.pruning.catalogue import Target, WeightFormat, catalogue
from trt_kd.pruning.latency_limit import TOKEN_MS, LatencyLimit, Stopwatch

MB = 1024**2
"""Bytes of a MB, as in ModelOpt."""
_TIMES = {"itl_ms": "ITL", "ttft_ms": "TTFT", TOKEN_MS: "per output token"}


def _amount(value: object) -> object:
    """Turn ``"80%"`` into 0.8 and check that a number is a share or a count."""
    if isinstance(value, str):
        text = value.strip()
        try:
            number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError as error:
            raise ValueError("write a share below 1, a percentage or a count") from error
    elif isinstance(value, bool):
        raise ValueError("write a share below 1, a percentage or a count")
    elif not isinstance(value, int | float):
        return value
    else:
        number = float(value)
    if not (0 < number < 1 or (number > 1 and number.is_integer())):
        raise ValueError("a share lies between 0 and 1, and a count is a whole number above 1")
    return number if number < 1 else int(number)


Amount = Annotated[float | int | None, BeforeValidator(_amount)]


class Budget(StrictModel):
    """Upper limits; a model fits if it keeps every one that is given."""

    params: Amount = None
    """Parameters: a share below 1, a percentage such as ``80%``, or a count."""
    active_params: Amount = None
    """The same of the parameters that one token passes through."""
    memory_mb: PositiveFloat | None = None
    """MB (1024^2 bytes) of weights and key-value cache as deployed, over all ranks together."""
    batch: PositiveInt = 1
    """Sequences in the cache that memory counts."""
    tokens: PositiveInt = 2048
    """Tokens of each of them."""
    weight_format: str = "bf16"
    """Format of the weights that memory counts; the target's if left out."""
    kv_format: str = "bf16"
    """Format of the key-value cache that memory counts."""
    latency: LatencyLimit | None = None
    """Limits on measured time; they need a latency table."""
    _stopwatch: Stopwatch | None = PrivateAttr(default=None)

    @field_validator("weight_format")
    @classmethod
    def _known_weights(cls, value: str) -> str:
        return _known("weight format", value, catalogue().formats)

    @field_validator("kv_format")
    @classmethod
    def _known_cache(cls, value: str) -> str:
        return _known("key-value cache format", value, catalogue().cache_bits)

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if self.latency is None and not self.counts:
            raise ValueError("give at least one of params, active_params, memory_mb and latency")
        return self

    @property
    def counts(self) -> bool:
        """Whether it limits what can be counted without a measurement."""
        return any(each is not None for each in (self.params, self.active_params, self.memory_mb))

    def timed_by(self, stopwatch: Stopwatch) -> Self:
        """The same limits with the means to hold models against those on time."""
        made = self.model_copy()
        made._stopwatch = stopwatch
        return made

    @property
    def stopwatch(self) -> Stopwatch | None:
        """Holds models against the limits on time; None where there are none.

        Raises:
            ConfigError: if there are, and no latency table was given.
        """
        if self.latency is not None and self._stopwatch is None:
            raise untimed()
        return self._stopwatch if self.latency is not None else None

    def deployed(self, target: Target) -> Self:
        """The same limits with memory in the format of ``target``, unless one was given."""
        if "weight_format" in self.model_fields_set:
            return self
        return self.model_copy(update={"weight_format": target.format})

    def limits(self, shape: ModelShape) -> dict[str, float]:
        """The limits for a model pruned from ``shape``, by name, as absolute numbers."""
        found = {}
        counts = {"params": shape.parameters, "active_params": shape.active_parameters}
        for name, present in counts.items():
            given = getattr(self, name)
            if given is not None:
                found[name] = given * present if given < 1 else float(given)
        if self.memory_mb is not None:
            found["memory_mb"] = self.memory_mb
        return found | (self.stopwatch.limits() if self.stopwatch else {})

    def values(self, shape: ModelShape) -> dict[str, Any]:
        """What ``shape``, of numbers or arrays, costs by the name of every limit given."""
        costs = {}
        if self.params is not None:
            costs["params"] = shape.parameters
        if self.active_params is not None:
            costs["active_params"] = shape.active_parameters
        if self.memory_mb is not None:
            costs["memory_mb"] = self.bytes_of(shape) / MB
        return costs | (self.stopwatch.values(shape) if self.stopwatch else {})

    def bytes_of(self, shape: ModelShape) -> Any:
        """Bytes of ``shape``, of numbers or arrays, with this budget's formats and workload."""
        parts = _bytes_by_part(shape, catalogue().formats[self.weight_format])
        return sum(parts.values()) + cache_bytes(shape, self.kv_format, self.batch, self.tokens)

    def fits(self, candidate: ModelShape, original: ModelShape) -> bool:
        """Whether ``candidate``, pruned from ``original``, keeps every limit."""
        limits = self.limits(original)
        return all(cost <= limits[name] for name, cost in self.values(candidate).items())

    def check(self, original: ModelShape) -> None:
        """Check that there is something to prune.

        Raises:
            ModelError: if the unpruned model keeps every limit already.
        """
        if not self.fits(original, original):
            return
        limits, costs = self.limits(original), self.values(original)
        told = ", ".join(f"{amount(n, c)} of {amount(n, limits[n])}" for n, c in costs.items())
        raise ModelError(
            f"the model fits the budget unpruned: {told}",
            hint="ask for less than it has, or leave out the pruning",
        )


def untimed() -> ConfigError:
    """What to say where time is limited and no latency table is given."""
    return ConfigError(
        "budget.latency needs measured times",
        hint="make a table with trt-kd latency-table and give it as --latency",
    )


def limited(budget: Budget | None) -> tuple[Budget, LatencyLimit]:
    """``budget`` and its limits on time, for which a latency table is given.

    Raises:
        ConfigError: if it has none.
    """
    if budget is None or budget.latency is None:
        raise ConfigError(
            "a latency table has no effect without limits on time",
            hint="give budget.latency, such as {itl_ms: 70%, batch: 4}, or leave the table out",
        )
    return budget, budget.latency


def _known(what: str, value: str, known: "dict[str, Any]") -> str:
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}; available: {', '.join(known)}")
    return value


def amount(name: str, value: float) -> str:
    """A limit or a cost in words."""
    if name == "memory_mb":
        return f"{value:,.1f} MB"
    if name in _TIMES:
        return f"{value:,.2f} ms {_TIMES[name]}"
    return f"{value:,.0f} {'active ' if name == 'active_params' else ''}parameters"


@dataclass(frozen=True)
class _Matrices:
    """Matrices of one kind, ``[outputs, inputs]`` each."""

    part: str
    count: Any
    outputs: Any
    inputs: Any
    row: bool = False
    """Whether its inputs come from channels, not from the residual stream after a norm."""


def _matrices(shape: ModelShape) -> Iterator[_Matrices]:
    hidden, layers, mixtures = shape.hidden, shape.layers, shape.expert_layers
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield _Matrices("attention", layers, query, hidden)
    yield _Matrices("attention", 2 * layers, key, hidden)
    yield _Matrices("attention", layers, hidden, query, row=True)
    dense = layers - mixtures
    yield _Matrices("mlp", dense * (2 if shape.gated else 1), shape.ffn, hidden)
    yield _Matrices("mlp", dense, hidden, shape.ffn, row=True)
    if shape.experts:
        experts = mixtures * shape.experts
        yield _Matrices("experts", 2 * experts, shape.expert_ffn, hidden)
        yield _Matrices("experts", experts, hidden, shape.expert_ffn, row=True)


def _bits(matrices: _Matrices, stored: WeightFormat) -> Any:
    """Bits of the matrices with all their scales; a partial block counts as a whole one."""
    block = stored.block or 1
    blocks = -(-matrices.inputs // block)
    weights = matrices.outputs * blocks * (block * stored.bits + stored.scale_bits)
    inputs = stored.input_bits + (stored.row_input_bits if matrices.row else 0)
    channels = matrices.outputs * stored.output_bits + matrices.inputs * inputs
    return matrices.count * (weights + channels + stored.tensor_bits)


def _bytes_by_part(shape: ModelShape, stored: WeightFormat) -> dict[str, Any]:
    counts = shape.parts()
    bits: dict[str, Any] = dict.fromkeys(counts, 0)
    left: dict[str, Any] = dict(counts)
    for matrices in _matrices(shape):
        bits[matrices.part] = bits[matrices.part] + _bits(matrices, stored)
        weights = matrices.count * matrices.outputs * matrices.inputs
        left[matrices.part] = left[matrices.part] - weights
    if stored.head:
        part = "embedding" if shape.tied else "lm_head"
        bits[part] = _bits(_Matrices(part, 1, shape.vocab, shape.hidden), stored)
        left[part] = 0
    return {part: -(-(bits[part] + left[part] * stored.rest_bits) // 8) for part in counts}


def cache_bytes(shape: ModelShape, kv_format: str, batch: int, tokens: int) -> Any:
    """Bytes of the key-value cache of ``batch`` sequences of ``tokens`` tokens."""
    return shape.kv_cache_bytes(batch, tokens, catalogue().cache_bits[kv_format] / 8)


def memory_bytes(
    shape: ModelShape,
    *,
    weight_format: str = "bf16",
    kv_format: str = "bf16",
    batch: int = 1,
    tokens: int = 2048,
) -> dict[str, int]:
    """Bytes of a deployed model by part: the parts of ``shape.parts()`` and ``kv_cache``.

    Projections and experts are in ``weight_format``, with their scales as the exporters store them
    (group scales of INT4 in 16 bits, as kernels hold them); embedding, head, norms, biases and
    router stay in 16 bits, 32 in float32 formats. Activations and the runtime's own buffers are
    not counted.

    Raises:
        ValueError: if a format is unknown.
    """
    known = catalogue()
    stored = known.formats[_known("weight format", weight_format, known.formats)]
    _known("key-value cache format", kv_format, known.cache_bits)
    parts = {part: int(count) for part, count in _bytes_by_part(shape, stored).items()}
    return parts | {"kv_cache": round(cache_bytes(shape, kv_format, batch, tokens))}


def memory_table(
    shape: ModelShape,
    *,
    formats: Sequence[str] | None = None,
    batches: Sequence[int] = (1, 8, 64),
    tokens: int = 2048,
    kv_format: str = "bf16",
) -> list[dict[str, Any]]:
    """Predicted memory by weight format and batch size, as rows for a report.

    Each row has ``format``, ``bits_per_weight``, ``batch``, ``tokens``, ``kv_format``,
    ``weights_mb``, ``kv_cache_mb`` and ``total_mb``.
    """
    rows = []
    for name in catalogue().formats if formats is None else formats:
        for batch in batches:
            parts = memory_bytes(
                shape, weight_format=name, kv_format=kv_format, batch=batch, tokens=tokens
            )
            cache = parts.pop("kv_cache")
            weights = sum(parts.values())
            rows.append(
                {
                    "format": name,
                    "bits_per_weight": catalogue().formats[name].bits_per_weight,
                    "batch": batch,
                    "tokens": tokens,
                    "kv_format": kv_format,
                    "weights_mb": weights / MB,
                    "kv_cache_mb": cache / MB,
                    "total_mb": (weights + cache) / MB,
                }
            )
    return rows
