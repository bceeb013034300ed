"""Figures of speed: over batch sizes, prompt lengths and loads, and beside the floor.

Only what was measured is drawn, and nothing where there is a single point. Of a sweep over several
lengths, figures over batch sizes show the lengths that were measured at most batch sizes; the
tables hold the rest.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from trt_kd.reporting.drawing import Drawing
from trt_kd.reporting.marks import Plane, Series, line_drawing
from trt_kd.reporting.model import Report, Role
from trt_kd.reporting.speed import Timed
from trt_kd.reporting.speed_model import LoadRecord, Percentiles, SpeedRecord

COLOURS: dict[Role, str] = {
    "teacher": "#8a8a8a",
    "teacher_quantized": "#8a8a8a",
    "corrected": "#009e73",
    "pruned": "#d55e00",
    "cross_entropy": "#cc79a7",
    "student": "#0087c7",
    "student_quantized": "#0087c7",
}
STYLES = (
    ("#0087c7", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D"), ("#8a8a8a", "v"),
    ("#e69f00", "P"), ("#56b4e9", "X"),
)  # fmt: skip
"""Colour and marker of variants that have no role, in turn."""
BOUNDS = {"weights": "o", "cache": "s", "compute": "^"}
"""Marker by what a step waits for."""

R = TypeVar("R", SpeedRecord, LoadRecord)


@dataclass(frozen=True)
class Curve:
    """Everything that was measured of one variant, and how its lines look."""

    name: str
    colour: str
    marker: str
    dashed: bool
    speed: Sequence[SpeedRecord]
    load: Sequence[LoadRecord]

    def series(self, points: Iterable[tuple[float, float]], **changes: object) -> Series:
        """A line through ``points``, in the order of x unless ``changes`` say otherwise."""
        found = list(points)
        fields = {"name": self.name, "colour": self.colour, "dashed": self.dashed}
        fields |= {"points": found, "markers": [self.marker] * len(found)}
        return Series(**(fields | changes))  # type: ignore[arg-type]


def report_curves(report: Report) -> list[Curve]:
    """Variants of a report that were measured themselves; quantized ones are solid diamonds."""
    return [
        Curve(
            variant.name,
            COLOURS[variant.role],
            "D" if variant.role.endswith("_quantized") else "o",
            not variant.role.endswith("_quantized"),
            [record for record in variant.speed if not record.under_load],
            variant.load,
        )
        for variant in report.variants
    ]


def _benchmark_curves(timed: Timed) -> list[Curve]:
    """Variants of a benchmark, by their names in it."""
    curves = []
    for number, (name, records) in enumerate(timed.speed.items()):
        colour, marker = STYLES[number % len(STYLES)]
        own = [record for record in records if not record.under_load]
        curves.append(Curve(name, colour, marker, False, own, timed.load.get(name, [])))
    return curves


def benchmark_figures(timed: Timed) -> list[Drawing]:
    """Every figure of one benchmark."""
    curves = _benchmark_curves(timed)
    return speed_figures(curves) + load_figures(curves)


def speed_figures(curves: Sequence[Curve]) -> list[Drawing]:
    """Every figure of workloads by our clock that has two points to join."""
    at = _most_measured(record for curve in curves for record in curve.speed)
    drawn = [
        _throughput(curves, at), _latency(curves, at), _trade(curves, at),
        _roofline(curves, at, DECODING), _roofline(curves, at, PREFILL), _prompts(curves),
    ]  # fmt: skip
    return [drawing for drawing in drawn if drawing is not None]


def load_figures(curves: Sequence[Curve]) -> list[Drawing]:
    """Every figure of loads that has two points to join."""
    at = _most_measured(record for curve in curves for record in curve.load)
    drawn = [
        _load_trade(curves, at),
        _goodput(curves, at, "requests in flight", lambda record: record.concurrency),
        _goodput(curves, at, "request rate", lambda record: record.request_rate),
    ]
    return [drawing for drawing in drawn if drawing is not None]


Lengths = tuple[int, int]
"""Tokens of prompt and answer."""


def _lengths(record: SpeedRecord | LoadRecord) -> Lengths:
    return record.input_tokens, record.output_tokens


def _most_measured(records: Iterable[SpeedRecord | LoadRecord]) -> Lengths:
    """Lengths with the most records, the shortest of several."""
    counts = Counter(map(_lengths, records))
    return min(counts, key=lambda each: (-counts[each], each), default=(0, 0))


def _ordered(records: Sequence[R], at: Lengths, x: Callable[[R], float | None]) -> list[R]:
    """Records at some lengths that have an x, in its order."""
    known = [record for record in records if _lengths(record) == at and x(record) is not None]
    return sorted(known, key=lambda record: x(record) or 0.0)


def _by_batch(curves: Sequence[Curve], at: Lengths) -> list[tuple[Curve, list[SpeedRecord]]]:
    found = [(curve, _ordered(curve.speed, at, lambda r: r.batch_size)) for curve in curves]
    return [(curve, records) for curve, records in found if records]


def _said(at: Lengths) -> str:
    return f"{at[0]} + {at[1]} tokens"


def _throughput(curves: Sequence[Curve], at: Lengths) -> Drawing | None:
    series = [
        curve.series(
            [(r.batch_size, r.output_tokens_per_s) for r in records],
            reach=[r.spread * r.output_tokens_per_s for r in records],
        )
        for curve, records in _by_batch(curves, at)
    ]
    plane = Plane("batch size", "output tokens per second", logarithmic=True)
    text = f"Bars: half range over the repeats. {_said(at)}."
    return line_drawing("Throughput by batch size", text, series, plane)


def _latency(curves: Sequence[Curve], at: Lengths) -> Drawing | None:
    series = [
        curve.series([(r.batch_size, r.itl_ms.p50) for r in records if r.itl_ms])
        for curve, records in _by_batch(curves, at)
        if any(r.itl_ms for r in records)
    ]
    plane = Plane("batch size", "ITL p50 (ms)", logarithmic=True)
    return line_drawing("Latency by batch size", f"{_said(at)}.", series, plane)


def _trade(curves: Sequence[Curve], at: Lengths) -> Drawing | None:
    series = [
        curve.series([(r.itl_ms.p50, r.output_tokens_per_s) for r in records if r.itl_ms])
        for curve, records in _by_batch(curves, at)
        if any(r.itl_ms for r in records)
    ]
    plane = Plane("ITL p50 (ms)", "output tokens per second")
    text = f"Along every line the batch grows. {_said(at)}."
    return line_drawing("Throughput against latency", text, series, plane)


@dataclass(frozen=True)
class Phase:
    """A part of answering that has a floor."""

    title: str
    over: str
    step: str
    floor: Callable[[SpeedRecord], tuple[float | None, str | None]]
    taken: Callable[[SpeedRecord], Percentiles | None]


DECODING = Phase(
    "Share of the roofline", "ITL", "a decoding step",
    lambda r: (r.decode_floor_ms, r.decode_bound), lambda r: r.itl_ms,
)  # fmt: skip
PREFILL = Phase(
    "Share of the roofline in prefill", "TTFT", "reading the prompts",
    lambda r: (r.prefill_floor_ms, r.prefill_bound), lambda r: r.ttft_ms,
)  # fmt: skip


def _roofline(curves: Sequence[Curve], at: Lengths, phase: Phase) -> Drawing | None:
    series = []
    for curve, records in _by_batch(curves, at):
        line, marks = [], []
        for record in records:
            (floor_ms, bound), taken = phase.floor(record), phase.taken(record)
            if floor_ms and taken:
                line.append((float(record.batch_size), 100 * floor_ms / taken.p50))
                marks.append(BOUNDS.get(bound or "", curve.marker))
        if line:
            series.append(curve.series(line, markers=marks))
    top = max([100.0, *(1.05 * y for one in series for _, y in one.points)])
    plane = Plane("batch size", f"floor / {phase.over} p50 (%)", logarithmic=True, top=top)
    text = (
        f"Least time of {phase.step} at this machine's measured peaks over the time it took. "
        f"What sets it: circles weights, squares the cache, triangles arithmetic. {_said(at)}."
    )
    return line_drawing(phase.title, text, series, plane)


def _prompts(curves: Sequence[Curve]) -> Drawing | None:
    """Time to the first token over prompt lengths, at the smallest batch and shortest answer."""
    every = [record for curve in curves for record in curve.speed]
    if not every:
        return None
    batch, output = min((r.batch_size, r.output_tokens) for r in every)
    series = []
    for curve in curves:
        records = [r for r in curve.speed if (r.batch_size, r.output_tokens) == (batch, output)]
        line = sorted((float(r.input_tokens), r.ttft_ms.p50) for r in records)
        if line:
            series.append(curve.series(line))
    plane = Plane("prompt tokens", "TTFT p50 (ms)", logarithmic=True)
    text = f"Batch {batch}, {output} output tokens."
    return line_drawing("Time to the first token by prompt length", text, series, plane)


def _load_trade(curves: Sequence[Curve], at: Lengths) -> Drawing | None:
    series = []
    for curve in curves:
        records = _ordered(curve.load, at, lambda r: r.concurrency)
        if records:
            line = [(r.tpot_ms.p50, r.output_tokens_per_s) for r in records]
            series.append(curve.series(line))
    plane = Plane("TPOT p50 (ms)", "output tokens per second")
    text = f"Along every line more requests are in flight. {_said(at)}."
    return line_drawing("Throughput against latency under load", text, series, plane)


def _goodput(
    curves: Sequence[Curve], at: Lengths, over: str, x: Callable[[LoadRecord], float | None]
) -> Drawing | None:
    series, limits = [], set()
    for curve in curves:
        records = [r for r in _ordered(curve.load, at, x) if r.goodput_requests_per_s is not None]
        if not records:
            continue
        limits |= {slo_text(record.slo) for record in records}
        every = [(x(r) or 0.0, r.requests_per_s) for r in records if r.requests_per_s is not None]
        good = [(x(r) or 0.0, r.goodput_requests_per_s or 0.0) for r in records]
        if every:
            series.append(curve.series(every, name="", dashed=True))
        series.append(curve.series(good, dashed=False))
    text = f"Solid: requests that met {' or '.join(sorted(limits))}; dashed: all. {_said(at)}."
    plane = Plane(over, "requests per second", logarithmic=True)
    return line_drawing(f"Goodput by {over}", text, series, plane)


def slo_text(slo: dict[str, float]) -> str:
    """The limits in words, such as ``TTFT <= 500 ms and TPOT <= 50 ms``."""
    return " and ".join(
        f"{name.removesuffix('_ms').upper()} \u2264 {value:g} ms" for name, value in slo.items()
    )
