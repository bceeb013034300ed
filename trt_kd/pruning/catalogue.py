"""Which sizes a deployment takes: rules as data, each with its source; needs no torch.

The rules stand in ``catalogue.yaml``. Everything here is arithmetic that holds for one size and for
an array of sizes alike, so a search over a grid and the check of one model share it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import lcm
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, PositiveInt, ValidationInfo, field_validator, model_validator
from typing_extensions import Self

from trt_kd.architectures.shape import ModelShape
from trt_kd.config import StrictModel, read_yaml, validate
from trt_kd.errors import ModelError

_FILE = Path(__file__).with_name("catalogue.yaml")

Severity = Literal["illegal", "slow"]
"""Illegal: a kernel or an exporter refuses it. Slow: it runs, off the fast path."""

SizeName = Literal[
    "hidden",
    "ffn",
    "expert_ffn",
    "heads",
    "kv_heads",
    "head_dim",
    "vocab",
    "experts",
    "query_width",
    "qkv_width",
    "group",
]

FIELDS: dict[str, tuple[str, ...]] = {
    "query_width": ("heads", "head_dim"),
    "qkv_width": ("heads", "kv_heads", "head_dim"),
    "group": ("heads", "kv_heads"),
}
"""Fields of ``ModelShape`` that a made size depends on; a violation is told of the first."""

SIZES = (
    "hidden",
    "ffn",
    "expert_ffn",
    "heads",
    "kv_heads",
    "head_dim",
    "vocab",
    "experts",
    "layers",
)
"""Fields of ``ModelShape`` that pruning can shrink."""


class WeightFormat(StrictModel):
    """How the weights of the decoder's projections are stored; see the file."""

    bits: PositiveInt
    """Of one weight, without its scales."""
    block: PositiveInt | None = None
    """Inputs that share one scale."""
    scale_bits: int = 0
    """Per block."""
    output_bits: int = 0
    """Per output channel."""
    input_bits: int = 0
    """Per input channel of every matrix."""
    row_input_bits: int = 0
    """Per input channel of output and down projections, whose smoothing no norm can take in."""
    tensor_bits: int = 0
    """Per matrix."""
    rest_bits: PositiveInt = 16
    """Of everything that is not quantized: embedding, head, norms, biases, router."""
    head: bool = False
    """Whether the vocabulary head, and an embedding tied to it, is quantized too."""

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight with its share of the block's scale, in closed form."""
        return self.bits + (self.scale_bits / self.block if self.block else 0)


class Target(StrictModel):
    """What a model is deployed on."""

    format: str = "bf16"
    """Format of the weights; ``int4_awq`` has blocks of 128, ``int4_awq_64`` of 64."""
    runtime: str = "transformers"
    gpu: str = "cpu"
    """Generation of the GPU, or ``cpu``."""
    tensor_parallel: PositiveInt = 1
    """Ranks that a layer is split over."""

    @field_validator("format", "runtime", "gpu")
    @classmethod
    def _known(cls, value: str, info: ValidationInfo) -> str:
        known = catalogue()
        choices = {"format": tuple(known.formats), "runtime": known.runtimes, "gpu": known.gpus}
        available = choices[str(info.field_name)]
        if value not in available:
            raise ValueError(
                f"unknown {info.field_name} {value!r}; available: {', '.join(available)}"
            )
        return value

    def __str__(self) -> str:
        """The target in a line's middle."""
        ranks = f", tensor parallel {self.tensor_parallel}" if self.tensor_parallel > 1 else ""
        return f"{self.format} on {self.runtime} ({self.gpu}{ranks})"


class Rule(StrictModel):
    """One constraint on sizes; see the file for its fields."""

    name: str
    what: str
    sizes: Annotated[tuple[SizeName, ...], Field(min_length=1)]
    multiple: PositiveInt | None = None
    multiple_of_size: Literal["kv_heads"] | None = None
    at_least_size: Literal["experts_per_token"] | None = None
    allowed: tuple[int, ...] | None = None
    maximum: PositiveInt | None = None
    power_of_two: bool = False
    ranks: Literal["whole", "each", "replicated"] = "whole"
    formats: tuple[str, ...] = ()
    runtimes: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()
    severity: Severity
    reason: str
    source: Annotated[tuple[str, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = (self.multiple, self.multiple_of_size, self.at_least_size, self.allowed)
        given = [kind for kind in (*kinds, self.maximum) if kind is not None]
        if len(given) + self.power_of_two + (self.ranks == "replicated") != 1:
            raise ValueError(f"rule {self.name!r} must be of exactly one kind")
        return self

    def applies(self, target: Target) -> bool:
        """Whether it concerns a deployment on ``target``."""
        named = (
            (self.formats, target.format),
            (self.runtimes, target.runtime),
            (self.gpus, target.gpu),
        )
        return all(not wanted or present in wanted for wanted, present in named)

    def holds(self, value: Any, target: Target, other: Any = None) -> Any:
        """Whether ``value`` keeps the rule; elementwise for an array.

        ``other`` is the size named by ``multiple_of_size`` or ``at_least_size``.
        """
        if self.allowed is not None:
            return np.isin(value, self.allowed)
        if self.maximum is not None:
            return value <= self.maximum
        if self.power_of_two:
            return (value & (value - 1)) == 0
        if self.at_least_size is not None:
            return value >= other
        ranks = target.tensor_parallel
        if self.ranks == "replicated":
            return (value % ranks == 0) | (ranks % np.maximum(value, 1) == 0)
        return value % (other if self.multiple_of_size else self.step(target)) == 0

    def step(self, target: Target) -> int:
        """What must divide the size; 1 for rules of another kind."""
        ranks = target.tensor_parallel if self.ranks == "each" else 1
        return (self.multiple or 1) * ranks

    def fields(self, name: str) -> tuple[str, ...]:
        """Fields of ``ModelShape`` that its size ``name`` and its limit depend on."""
        relative = self.multiple_of_size or self.at_least_size
        return FIELDS.get(name, (name,)) + ((relative,) if relative else ())

    def satisfied(self, name: str, shape: ModelShape, target: Target) -> Any:
        """Whether its size ``name`` of ``shape`` keeps it; the shape may hold arrays."""
        relative = self.multiple_of_size or self.at_least_size
        other = getattr(shape, relative) if relative else None
        return self.holds(measured(name, shape, target), target, other)


class Catalogue(StrictModel):
    """Everything the file holds."""

    formats: dict[str, WeightFormat]
    cache_bits: dict[str, float]
    runtimes: tuple[str, ...]
    gpus: tuple[str, ...]
    rules: tuple[Rule, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [rule.name for rule in self.rules]
        twice = sorted({name for name in names if names.count(name) > 1})
        unknown = [
            f"{rule.name}: {name}"
            for rule in self.rules
            for used, known in (
                (rule.formats, self.formats),
                (rule.runtimes, self.runtimes),
                (rule.gpus, self.gpus),
            )
            for name in used
            if name not in known
        ]
        if twice or unknown:
            raise ValueError(f"rules named twice {twice}, unknown names {unknown}")
        return self


@dataclass(frozen=True)
class Violation:
    """A size that breaks a rule."""

    size: str
    """Field of ``ModelShape``."""
    value: int
    detail: str
    """The size made of it that the rule is about, if any, such as ``query_width 576``."""
    rule: str
    fields: tuple[str, ...]
    """Every field that the rule looks at."""
    severity: Severity
    what: str
    reason: str
    below: int | None
    """Nearest smaller size that breaks no rule of this severity or a worse one; None if none."""
    above: int | None

    @property
    def nearest(self) -> str:
        """The nearest legal sizes in words."""
        found = [str(size) for size in (self.below, self.above) if size is not None]
        return " and ".join(found) if found else "none"

    @property
    def subject(self) -> str:
        """The size in words, such as ``heads 9 (query_width 576)``."""
        return f"{self.size} {self.value}" + (f" ({self.detail})" if self.detail else "")

    def __str__(self) -> str:
        """One line of a table."""
        return f"{self.severity}: {self.subject}, {self.what} (nearest: {self.nearest})"


@cache
def catalogue() -> Catalogue:
    """The catalogue, read once."""
    return validate(Catalogue, read_yaml(_FILE), where=_FILE.name)


def measured(name: str, shape: ModelShape, target: Target) -> Any:
    """Size ``name`` of ``shape``, made sizes included; the shape may hold arrays."""
    if name == "query_width":
        return shape.heads * shape.head_dim
    if name == "qkv_width":
        held = np.maximum(shape.kv_heads, target.tensor_parallel)
        return (shape.heads + 2 * held) * shape.head_dim
    if name == "group":
        return shape.heads // shape.kv_heads
    return getattr(shape, name)


def bound(target: Target, severity: Severity | None = None) -> Iterator[tuple[Rule, str]]:
    """Every rule for ``target`` with each size it binds; of one severity if given."""
    for rule in catalogue().rules:
        if rule.applies(target) and severity in {None, rule.severity}:
            yield from ((rule, name) for name in rule.sizes)


def violations(shape: ModelShape, target: Target) -> list[Violation]:
    """Every rule for ``target`` that ``shape`` breaks, illegal ones first."""
    found = []
    for rule, name in bound(target):
        if rule.satisfied(name, shape, target):
            continue
        field = FIELDS.get(name, (name,))[0]
        below, above = _nearest(field, shape, target, rule.severity)
        found.append(
            Violation(
                size=field,
                value=getattr(shape, field),
                detail=f"{name} {measured(name, shape, target)}" if name in FIELDS else "",
                rule=rule.name,
                fields=rule.fields(name),
                severity=rule.severity,
                what=rule.what,
                reason=rule.reason,
                below=below,
                above=above,
            )
        )
    return sorted(found, key=lambda violation: violation.severity)


def _nearest(
    field: str, shape: ModelShape, target: Target, severity: Severity
) -> tuple[int | None, int | None]:
    rules = [
        (rule, name)
        for rule, name in bound(target, None if severity == "slow" else "illegal")
        if field in rule.fields(name)
    ]
    step = lcm(*(rule.step(target) for rule, name in rules if name == field))

    def good(size: int) -> bool:
        changed = shape.with_sizes(**{field: size})
        return all(bool(rule.satisfied(name, changed, target)) for rule, name in rules)

    value = getattr(shape, field)
    under = range((value - 1) // step * step, 0, -step)
    over = range((value // step + 1) * step, (value // step + 1025) * step, step)
    return next(filter(good, under), None), next(filter(good, over), None)


def refused(
    shape: ModelShape, target: Target, original: ModelShape | None = None
) -> list[Violation]:
    """Illegal sizes of ``shape``; with ``original`` only where it differs from that."""
    changed = set(SIZES) if original is None else set(shape.changes(original))
    return [
        violation
        for violation in violations(shape, target)
        if violation.severity == "illegal" and changed.intersection(violation.fields)
    ]


def check(shape: ModelShape, target: Target, original: ModelShape | None = None) -> None:
    """Check that ``target`` takes every size of ``shape``.

    With ``original`` only the sizes that differ from it are checked.

    Raises:
        ModelError: naming the size, the rule and the nearest legal sizes.
    """
    found = refused(shape, target, original)
    if not found:
        return
    first, *rest = found
    more = f" (and {len(rest)} more)" if rest else ""
    raise ModelError(
        f"{first.subject} is illegal for {target}: {first.what} [{first.rule}]{more}",
        hint=f"the nearest legal sizes are {first.nearest}; {first.reason}",
    )


def legal(name: str, size: int, target: Target) -> bool:
    """Whether ``target`` takes ``size`` for the field ``name``, whatever the other sizes.

    Rules that relate two sizes, such as heads to key-value heads, are left to ``violations``.

    Raises:
        ValueError: if pruning knows no such field.
    """
    return bool(_legal(name, size, target))


def _legal(name: str, size: Any, target: Target) -> Any:
    if name not in SIZES:
        raise ValueError(f"unknown size {name!r}; known: {', '.join(SIZES)}")
    result: Any = np.asarray(size) > 0
    for rule, bound_name in bound(target, "illegal"):
        relative = rule.multiple_of_size or rule.at_least_size
        if bound_name == name and relative is None:
            result = result & rule.holds(size, target)
    return result


def legal_sizes(name: str, maximum: int, target: Target, *, multiple_of: int) -> list[int]:
    """Legal multiples of ``multiple_of`` below ``maximum``, and ``maximum`` itself, ascending.

    The present size is last whatever it is: a model is not refused for what it is already.
    """
    multiples = np.arange(multiple_of, maximum, multiple_of)
    return [*multiples[_legal(name, multiples, target)].tolist(), maximum]
