"""Figures of the report: quality against latency, divergence, throughput.

Colours are those of Okabe and Ito (2008), told apart by shape as well, and every mark is labelled
where it stands.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from trt_kd.reporting.drawing import INK, Drawing, canvas, svg_of
from trt_kd.reporting.labels import Box, Point, distance, nearest, place_labels
from trt_kd.reporting.model import Report, Role, Variant
from trt_kd.reporting.readings import (
    first_workload,
    matching,
    mean_accuracy,
    mean_accuracy_stderr,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS: dict[Role, str] = {
    "teacher": "#8a8a8a",
    "teacher_quantized": "#8a8a8a",
    "corrected": "#009e73",
    "pruned": "#d55e00",
    "cross_entropy": "#cc79a7",
    "student": "#0087c7",
    "student_quantized": "#0087c7",
}
HEIGHT = 3.3
"""Inches."""
FAR_POINTS = 14.0
"""From here on a name needs a line to its mark."""

Line = list[tuple[float, float]]
"""Corners of a line, in the units of the axes."""


@dataclass(frozen=True)
class Mark:
    """A variant in a latency-quality plane."""

    role: Role
    name: str
    latency: float
    quality: float
    stderr: float
    shared: bool
    """Its latency was measured on another variant of the same shapes."""


def figures(report: Report) -> list[Drawing]:
    """Every figure that the report has numbers for."""
    drawn = [
        _trade_off(report, "Agreement against latency", "top-1 agreement with the teacher (%)",
                   lambda v: v.quality.top1_agreement, lambda v: v.quality.top1_agreement_stderr),
        _trade_off(report, "Accuracy against latency", "mean task accuracy (%)",
                   mean_accuracy, mean_accuracy_stderr),
        _divergence(report),
        _throughput(report),
    ]  # fmt: skip
    return [drawing for drawing in drawn if drawing is not None]


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (latency, quality) points that no other beats, from fast to slow.

    One point beats another if it is no worse on both axes and better on one.
    """
    front: list[int] = []
    best = -math.inf
    last: tuple[float, float] | None = None
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        point = points[index]
        if point[1] > best or point == last:
            front.append(index)
            best, last = point[1], point
    return front


def _trade_off(
    report: Report,
    title: str,
    label: str,
    quality: Callable[[Variant], float | None],
    stderr: Callable[[Variant], float | None],
) -> Drawing | None:
    marks = _marks(report, quality, stderr)
    workload = first_workload(report)
    if len(marks) < 2 or workload is None:
        return None
    with canvas(HEIGHT) as figure:
        axes = figure.subplots()
        front = [marks[i] for i in pareto([(m.latency, m.quality) for m in marks])]
        axes.plot(
            [m.latency for m in front], [m.quality for m in front],
            color=INK, linewidth=1, linestyle=(0, (4, 3)), alpha=0.6, zorder=1,
        )  # fmt: skip
        for mark in marks:
            _draw_mark(axes, mark)
        axes.set_xlabel(f"ITL p50 at batch {workload.batch_size} (ms), lower is better")
        axes.set_ylabel(label)
        axes.set_xlim(0, 1.28 * max(mark.latency for mark in marks))
        axes.margins(y=0.18)
        _label(figure, axes, marks, [[(m.latency, m.quality) for m in front]])
        svg = svg_of(figure, title)
    text = (
        f"{title}. Dashed: the Pareto front, variants that no other beats on both axes. Bars: "
        "95 % intervals. Diamonds: quantized. Hollow: latency of a variant of the same shapes."
    )
    return Drawing(title, text, svg)


def _marks(
    report: Report,
    quality: Callable[[Variant], float | None],
    stderr: Callable[[Variant], float | None],
) -> list[Mark]:
    workload = first_workload(report)
    marks = []
    for variant in report.variants:
        record = matching(report, variant, workload) if workload else None
        good = quality(variant)
        if record is None or record.itl_ms is None or good is None:
            continue
        error = 100 * (stderr(variant) or 0.0)
        shared = not variant.speed
        latency = record.itl_ms.p50
        marks.append(Mark(variant.role, variant.name, latency, 100 * good, error, shared))
    return marks


def _draw_mark(axes: "Axes", mark: Mark) -> None:
    colour = COLOURS[mark.role]
    axes.errorbar(
        mark.latency,
        mark.quality,
        yerr=1.96 * mark.stderr,
        fmt="D" if mark.role.endswith("_quantized") else "o",
        markersize=7,
        markerfacecolor="none" if mark.shared else colour,
        markeredgecolor=colour,
        markeredgewidth=1.6,
        ecolor=colour,
        elinewidth=1.2,
        zorder=3,
    )


def _label(figure: "Figure", axes: "Axes", marks: list[Mark], lines: list[Line]) -> None:
    """Write each name beside its mark, with a thin line to it where it had to go further off."""
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    frame = axes.get_window_extent()
    places = [axes.transData.transform((mark.latency, mark.quality)) for mark in marks]
    points = [
        Point(float(x), float(y), mark.name) for mark, (x, y) in zip(marks, places, strict=True)
    ]
    obstacles = _obstacles(axes, marks, lines, scale)
    inside = (frame.x0, frame.y0, frame.x1, frame.y1)
    boxes = place_labels(points, obstacles, inside, pixels_per_point=scale)
    to_data = axes.transData.inverted().transform
    for point, box in zip(points, boxes, strict=True):
        # Letters are narrower or wider than guessed: let them start at the mark's side.
        side = 0 if box[0] > point.x else 2 if box[2] < point.x else 1
        edge = (box[0], (box[0] + box[2]) / 2, box[2])[side]
        x, y = to_data((edge, (box[1] + box[3]) / 2))
        text = axes.text(x, y, point.name, ha=("left", "center", "right")[side],
                         va="center_baseline", zorder=4)  # fmt: skip
        text.set_in_layout(False)
        if distance(point, box) > FAR_POINTS * scale:
            ends = zip(to_data((point.x, point.y)), to_data(nearest(point, box)), strict=True)
            axes.plot(*ends, color=INK, linewidth=0.7, alpha=0.6, zorder=2, scalex=False,
                      scaley=False)  # fmt: skip


def _obstacles(axes: "Axes", marks: list[Mark], lines: list[Line], scale: float) -> list[Box]:
    """What a name should not cover: marks, their intervals, and ``lines``."""
    to_pixels = axes.transData.transform
    boxes = []
    for mark in marks:
        x, y = to_pixels((mark.latency, mark.quality))
        reach = to_pixels((mark.latency, mark.quality + 1.96 * mark.stderr))[1] - y
        for wide, high in ((6 * scale, 6 * scale), (scale, reach)):
            boxes.append((x - wide, y - high, x + wide, y + high))
    for first, second in (ends for line in lines for ends in pairwise(line)):
        (x0, y0), (x1, y1) = to_pixels(first), to_pixels(second)
        for step in range(60):
            x, y = x0 + (x1 - x0) * step / 60, y0 + (y1 - y0) * step / 60
            boxes.append((x - scale, y - scale, x + scale, y + scale))
    return boxes


def _divergence(report: Report) -> Drawing | None:
    rows = [v for v in report.variants if v.quality.kl_to_teacher_nats is not None]
    rows = [v for v in rows if v.role != "teacher"][::-1]
    if not rows:
        return None
    title = "Divergence from the teacher"
    with canvas(0.9 + 0.42 * len(rows)) as figure:
        axes = figure.subplots()
        values = [v.quality.kl_to_teacher_nats or 0.0 for v in rows]
        errors = [1.96 * (v.quality.kl_to_teacher_nats_stderr or 0.0) for v in rows]
        axes.barh(
            range(len(rows)), values, height=0.62, color=[COLOURS[v.role] for v in rows],
            xerr=errors, error_kw={"ecolor": INK, "elinewidth": 1.2},
        )  # fmt: skip
        axes.set_yticks(range(len(rows)), [v.name for v in rows])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("KL to the teacher (nats per token)")
        limit = max(v + e for v, e in zip(values, errors, strict=True)) or 1.0
        axes.set_xlim(0, 1.2 * limit)
        for place, (value, error) in enumerate(zip(values, errors, strict=True)):
            axes.text(value + error + 0.015 * limit, place, f"{value:.3f}", va="center_baseline")
        svg = svg_of(figure, title)
    return Drawing(title, f"{title} on held-out text. Lines: 95 % intervals.", svg)


def _throughput(report: Report) -> Drawing | None:
    rows = [v for v in report.variants if len(v.speed) > 1]
    if not rows:
        return None
    title = "Throughput by batch size"
    with canvas(HEIGHT) as figure:
        axes = figure.subplots()
        ends: list[Mark] = []
        lines: list[Line] = []
        for variant in rows:
            records = sorted(variant.speed, key=lambda record: record.batch_size)
            sizes = [record.batch_size for record in records]
            rates = [record.output_tokens_per_s for record in records]
            quantized = variant.role.endswith("_quantized")
            axes.errorbar(
                sizes, rates, yerr=[r.spread * r.output_tokens_per_s for r in records],
                color=COLOURS[variant.role], marker="D" if quantized else "o", markersize=6,
                linestyle="-" if quantized else (0, (4, 3)), linewidth=1.6,
            )  # fmt: skip
            lines.append(list(zip(sizes, rates, strict=True)))
            ends.append(Mark(variant.role, variant.name, sizes[-1], rates[-1], 0.0, False))
        sizes = sorted({record.batch_size for v in rows for record in v.speed})
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlim(0, 1.5 * sizes[-1])
        axes.set_ylim(0, None)
        axes.set_xlabel("batch size")
        axes.set_ylabel("output tokens per second")
        _label(figure, axes, ends, lines)
        svg = svg_of(figure, title)
    text = f"{title}. Bars: half range over the repeats. Solid: quantized."
    return Drawing(title, text, svg)
