"""The latency table: what was measured of which sizes, in the file that searches read."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import PositiveFloat, PositiveInt, ValidationError, ValidationInfo, model_validator

from trt_kd.architectures.shape import ModelShape
from trt_kd.config import StrictModel
from trt_kd.errors import ArtifactError, ConfigError
from trt_kd.latency.model import LatencyModel, Timed
from trt_kd.latency.operators import METRICS, Metric

FILE = "latency.json"


class Lengths(NamedTuple):
    """Tokens of every sequence."""

    input_tokens: int
    """Prompt (ISL)."""
    output_tokens: int
    """Decoded (OSL)."""

    def __str__(self) -> str:
        """``128 + 32``."""
        return f"{self.input_tokens} + {self.output_tokens}"


def chosen_lengths(
    measured: Sequence[Lengths], input_tokens: int | None, output_tokens: int | None
) -> Lengths:
    """The one pair of ``measured`` with the lengths that are given.

    Raises:
        ConfigError: if there is none, or more than one.
    """
    wanted = (input_tokens, output_tokens)
    found = [
        each
        for each in measured
        if all(asked in (None, has) for asked, has in zip(wanted, each, strict=True))
    ]
    if len(found) == 1:
        return found[0]
    told = ", ".join(map(str, measured))
    if not found:
        asked = " + ".join("any" if length is None else str(length) for length in wanted)
        raise ConfigError(
            f"{asked} tokens are not in the latency table; it has {told}",
            hint="name a pair of those as budget.latency.input_tokens and output_tokens, or make "
            "the table anew",
        )
    raise ConfigError(
        f"the latency table has {len(measured)} pairs of lengths: {told} tokens",
        hint="name one as budget.latency.input_tokens and output_tokens",
    )


class Cell(StrictModel):
    """One measured model at one batch size and pair of lengths."""

    batch_size: PositiveInt
    input_tokens: PositiveInt
    """Prompt tokens of every sequence (ISL)."""
    output_tokens: PositiveInt
    """Tokens decoded for every sequence (OSL)."""
    ttft_ms: dict[str, PositiveFloat]
    """Time to first token by percentile, ``p50``, ``p90`` and ``p99``."""
    itl_ms: dict[str, PositiveFloat] | None
    """Inter-token latency by percentile; null with one output token."""
    spread: float
    """Half range of the runs' throughput over its median."""

    @model_validator(mode="before")
    @classmethod
    def _of_version_1(cls, given: object, info: ValidationInfo) -> object:
        """Add the lengths that a table of version 1 gives all of its cells, as the context."""
        return {**info.context, **given} if info.context and isinstance(given, dict) else given

    @property
    def lengths(self) -> Lengths:
        """Both of them."""
        return Lengths(self.input_tokens, self.output_tokens)


class Row(StrictModel):
    """One measured model."""

    sizes: dict[str, int]
    """Sizes that differ from the unpruned model's, by field of ``ModelShape``."""
    cells: list[Cell]
    """By lengths and batch size."""


class Lane(StrictModel):
    """Everything measured in one lane."""

    lane: dict[str, Any]
    """Settings of the exporter."""
    backend: str
    """The runtime that was timed."""
    kl_nats: float
    """What the format costs: divergence of the unpruned model's export from it, nats per token."""
    rows: list[Row]
    """The unpruned model, then every probe."""


class LatencyTable(StrictModel):
    """The file ``latency.json``."""

    schema_version: Literal[2] = 2
    hardware: dict[str, Any]
    """Machine and versions."""
    source: dict[str, Any]
    """Sizes of the unpruned model, as ``ModelShape`` has them."""
    lanes: dict[str, Lane]
    """By the name that the recipe gives the lane."""

    @cached_property
    def shape(self) -> ModelShape:
        """The unpruned model's shape."""
        return ModelShape(**self.source)

    @cached_property
    def lengths(self) -> list[Lengths]:
        """Every pair that was measured."""
        rows = [row for lane in self.lanes.values() for row in lane.rows]
        return list(dict.fromkeys(cell.lengths for row in rows for cell in row.cells))

    def model(
        self, lane: str, percentile: int = 50, *, lengths: Lengths | None = None
    ) -> LatencyModel:
        """The latency model of a lane at a pair of lengths, which may be left out if it is alone.

        Raises:
            ConfigError: if the table has no such lane or lengths.
        """
        if lane not in self.lanes:
            raise ConfigError(
                f"the latency table has no lane {lane!r}",
                hint=f"available: {', '.join(self.lanes)}",
            )
        lengths = chosen_lengths(self.lengths, *(lengths or (None, None)))
        rows = self.lanes[lane].rows
        timed = [_timed(self.shape, row, f"p{percentile}", lengths) for row in rows]
        return LatencyModel(lane, timed, input_tokens=lengths.input_tokens)

    def save(self, folder: Path) -> None:
        """Write the file into ``folder``."""
        text = json.dumps(self.model_dump(mode="json"), indent=1)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")


def read_table(folder: Path) -> LatencyTable:
    """Read what the latency stage wrote, also before tables had several pairs of lengths.

    Raises:
        ArtifactError: if it is missing or damaged.
    """
    path = folder / FILE
    anew = "make it anew with trt-kd latency-table"
    try:
        return _table_of(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read: {error.strerror}", hint="make it with trt-kd latency-table"
        ) from error
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in reason["loc"])
        raise ArtifactError(
            f"{path} is no latency table: {place}: {reason['msg']}", hint=anew
        ) from error
    except ValueError as error:
        raise ArtifactError(f"{path} is no latency table: {error}", hint=anew) from error


def _table_of(content: Any) -> LatencyTable:
    """Version 1 has one pair of lengths, beside the lanes."""
    if not isinstance(content, dict) or content.get("schema_version") != 1:
        return LatencyTable.model_validate(content)
    lengths = {name: content.pop(name, None) for name in Lengths._fields}
    return LatencyTable.model_validate(content | {"schema_version": 2}, context=lengths)


def drift_corrected(
    groups: Sequence[tuple[Sequence[Cell], Sequence[Row]]], base: Sequence[Cell] | None = None
) -> list[Row]:
    """The unpruned model's row and every probe's, on one scale.

    Every group of probes was timed in turns with the unpruned model: what the machine was slower
    or faster for that model than over all groups, it was for the probes.

    Args:
        groups: the unpruned model's cells and the probes' rows, group by group.
        base: the unpruned model's cells on the scale wanted; left out, their medians.
    """
    if base is None:
        base = [_middle([cells[i] for cells, _ in groups]) for i in range(len(groups[0][0]))]
    rows = [Row(sizes={}, cells=list(base))]
    for cells, probes in groups:
        for row in probes:
            scaled = [
                _scaled(cell, reference, here)
                for cell, reference, here in zip(row.cells, base, cells, strict=True)
            ]
            rows.append(row.model_copy(update={"cells": scaled}))
    return rows


def _middle(cells: Sequence[Cell]) -> Cell:
    """Cell with the median of every number."""
    from statistics import median

    def of(metric: Metric) -> dict[str, float] | None:
        found = [getattr(cell, metric) for cell in cells]
        if found[0] is None:
            return None
        return {name: median(one[name] for one in found) for name in found[0]}

    return cells[0].model_copy(update={"ttft_ms": of("ttft_ms"), "itl_ms": of("itl_ms")})


def _scaled(cell: Cell, reference: Cell, here: Cell) -> Cell:
    """``cell`` times what the reference is over all groups, over what it was in this one."""
    update: dict[str, Any] = {}
    for metric in METRICS:
        values, base, now = (getattr(one, metric) for one in (cell, reference, here))
        if values is not None:
            factor = base["p50"] / now["p50"]
            update[metric] = {name: value * factor for name, value in values.items()}
    return cell.model_copy(update=update)


def _timed(source: ModelShape, row: Row, percentile: str, lengths: Lengths) -> Timed:
    ms: dict[tuple[Metric, int], float] = {}
    for cell in (each for each in row.cells if each.lengths == lengths):
        ms["ttft_ms", cell.batch_size] = cell.ttft_ms[percentile]
        if cell.itl_ms is not None:
            ms["itl_ms", cell.batch_size] = cell.itl_ms[percentile]
    return Timed(source.with_sizes(**row.sizes), ms)
