"""The comparison table, and the form of every table.

The first row is the baseline, every change has a sign, and spreads stand by their numbers. Size,
quality and speed stand side by side, so that no row can look good alone; every stage of the
pipeline is a row, so that what pruning cost and what recovery gave back can be read off.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from trt_kd.reporting.formatting import (
    MISSING,
    fixed,
    percent_change,
    signed,
    significant,
    times,
)
from trt_kd.reporting.model import Report, Variant
from trt_kd.reporting.readings import (
    first_workload,
    hardware,
    load_of,
    matching,
    perplexity_stderr,
    task_names,
)
from trt_kd.reporting.speed_model import SpeedRecord


@dataclass(frozen=True)
class Cell:
    """One number with its spread and its change against the baseline."""

    value: str = MISSING
    spread: str = ""
    change: str = ""

    def text(self) -> str:
        """The cell on one line."""
        spread = f" ± {self.spread}" if self.spread else ""
        change = f" ({self.change})" if self.change else ""
        return self.value + spread + change


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    name: str
    cells: list[Cell]
    baseline: bool = False
    detail: str = ""


@dataclass(frozen=True)
class Table:
    """A table with its caption; ``groups`` are (heading, columns) over the columns."""

    first: str
    columns: list[str]
    rows: list[Row]
    caption: str = ""
    groups: list[tuple[str, int]] = field(default_factory=list)


@dataclass(frozen=True)
class _Column:
    """One measured number: how to read it from a row and how to show it."""

    title: str
    read: Callable[[Variant], float | None]
    show: Callable[[float], str]
    change: Callable[[float, float], str]
    spread: Callable[[Variant], str] = lambda variant: ""


def comparison(report: Report) -> Table:
    """Every variant against the baseline: size, quality, speed on the first workload."""
    sizes = _size_columns()
    quality = _quality_columns(report)
    workload = first_workload(report)
    speed = _speed_columns(report, workload) if workload else []
    columns = sizes + quality + speed
    base = report.variants[0]
    rows = [
        Row(
            name=variant.name,
            cells=[_cell(column, variant, base) for column in columns],
            baseline=variant is base,
            detail=detail(report, variant),
        )
        for variant in report.variants
    ]
    groups = [("Size", len(sizes)), ("Quality", len(quality))]
    if workload:
        groups.append((f"Speed, {load_of(workload)}", len(speed)))
    return Table("Variant", [c.title for c in columns], rows, caption(report), groups)


def _cell(column: _Column, variant: Variant, base: Variant) -> Cell:
    value, start = column.read(variant), column.read(base)
    if value is None:
        return Cell()
    change = "" if variant is base or start is None else column.change(value, start)
    return Cell(column.show(value), column.spread(variant), change)


def detail(report: Report, variant: Variant) -> str:
    """What ships, what was judged and whose speed is shown, in a few words."""
    lane = variant.lane if variant.lane == variant.format else f"{variant.lane} {variant.format}"
    parts = [lane]
    if variant.evaluated == "checkpoint" and variant.lane != "checkpoint":
        parts.append("quality of the checkpoint")
    twin = report.variant(variant.same_speed_as)
    if twin is not None:
        parts.append(f"same shapes as {twin.name}")
    return "; ".join(parts)


def _size_columns() -> list[_Column]:
    return [
        _Column(
            "Parameters (M)",
            lambda v: v.parameters / 1e6,
            lambda x: significant(x, 4),
            percent_change,
        ),
        _Column("Size (MB)", lambda v: v.size_bytes / 1e6, significant, percent_change),
    ]


def _quality_columns(report: Report) -> list[_Column]:
    columns = [
        _Column(
            "KL to teacher (nats)",
            lambda v: v.quality.kl_to_teacher_nats,
            lambda x: fixed(x, 3),
            lambda x, base: signed(x - base, 3),
            lambda v: _spread(v.quality.kl_to_teacher_nats_stderr, 3),
        ),
        _Column(
            "Top-1 agreement (%)",
            lambda v: scaled(v.quality.top1_agreement, 100),
            lambda x: fixed(x, 1),
            lambda x, base: signed(x - base, 1),
            lambda v: _spread(scaled(v.quality.top1_agreement_stderr, 100), 1),
        ),
        _Column(
            "Perplexity",
            lambda v: v.quality.perplexity,
            lambda x: fixed(x, 2),
            lambda x, base: signed(x - base, 2),
            lambda v: _spread(perplexity_stderr(v), 2),
        ),
    ]
    return columns + [_task_column(task) for task in task_names(report)]


def _task_column(task: str) -> _Column:
    def accuracy(variant: Variant) -> float | None:
        score = variant.quality.tasks.get(task)
        return None if score is None else 100 * score.accuracy

    def spread(variant: Variant) -> str:
        score = variant.quality.tasks.get(task)
        return _spread(scaled(score.stderr, 100) if score else None, 1)

    title = f"{task.replace('_', ' ')} (%)"
    return _Column(
        title, accuracy, lambda x: fixed(x, 1), lambda x, base: signed(x - base, 1), spread
    )


def _speed_columns(report: Report, workload: SpeedRecord) -> list[_Column]:
    def record(variant: Variant) -> SpeedRecord | None:
        return matching(report, variant, workload)

    def milliseconds(name: str) -> Callable[[Variant], float | None]:
        def read(variant: Variant) -> float | None:
            found = record(variant)
            spans = getattr(found, name) if found else None
            return spans.p50 if spans else None

        return read

    def rate(variant: Variant) -> float | None:
        found = record(variant)
        return found.output_tokens_per_s if found else None

    def spread(variant: Variant) -> str:
        found = record(variant)
        return f"{fixed(100 * found.spread, 0)} %" if found else ""

    return [
        _Column("TTFT p50 (ms)", milliseconds("ttft_ms"), significant, percent_change),
        _Column("ITL p50 (ms)", milliseconds("itl_ms"), significant, percent_change),
        _Column("Throughput (tok/s)", rate, significant, lambda x, base: times(x / base), spread),
    ]


def caption(report: Report) -> str:
    """Hardware, workload, repeats and what every spread means."""
    parts = [hardware(report)]
    tokens = {v.quality.heldout_tokens for v in report.variants} - {None}
    if tokens:
        counts = " or ".join(f"{count:,}" for count in sorted(n for n in tokens if n))
        parts.append(f"Quality: {counts} held-out tokens, ± standard error over blocks")
    sizes = {
        t: sorted({v.quality.tasks[t].n for v in report.variants if t in v.quality.tasks})
        for t in task_names(report)
    }
    if sizes:
        items = ", ".join(f"{task} {' or '.join(map(str, n))}" for task, n in sizes.items())
        parts.append(f"Tasks, items each: {items}; ± standard error")
    workload = first_workload(report)
    if workload:
        parts.append(
            f"Speed: {workload.backend}, {load_of(workload)}, {workload.input_tokens} + "
            f"{workload.output_tokens} tokens, median of {workload.repeats} interleaved runs, "
            "± half range"
        )
    parts.append(f"Changes are against {report.variants[0].name}")
    parts.append(f"Recipe {report.name}, {report.created[:10]}")
    return ". ".join(part for part in parts if part) + "."


def scaled(value: float | None, factor: float) -> float | None:
    """``value`` times ``factor``, or None."""
    return None if value is None else factor * value


def _spread(stderr: float | None, digits: int) -> str:
    return fixed(stderr, digits) if stderr else ""


def markdown(table: Table) -> str:
    """``table`` in GitHub's Markdown, caption below."""
    head = [table.first, *_titles(table)]
    lines = [_line(head), _line([":--", *["--:"] * len(table.columns)])]
    for row in table.rows:
        name = f"{row.name} (baseline)" if row.baseline else row.name
        name += f" [{row.detail}]" if row.detail else ""
        lines.append(_line([name, *(cell.text() for cell in row.cells)]))
    return "\n".join(lines) + (f"\n\n{table.caption}" if table.caption else "") + "\n"


def _titles(table: Table) -> list[str]:
    """Columns, with the heading above them where it alone tells two of them apart."""
    if len(set(table.columns)) == len(table.columns):
        return table.columns
    above = [heading for heading, span in table.groups for _ in range(span)]
    pairs = zip(above, table.columns, strict=True)
    return [f"{heading}: {column}" for heading, column in pairs]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(plain(cell) for cell in cells) + " |"


def plain(text: str) -> str:
    """Text that cannot break out of a Markdown cell or bring in HTML."""
    for character in ("\\", "|", "*", "_", "`", "[", "]"):
        text = text.replace(character, "\\" + character)
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())
