"""Figures of the report: quality against latency, divergence, speed.

Colours are those of Okabe and Ito (2008), told apart by shape as well, and every mark is labelled
where it stands.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trt_kd.reporting.drawing import INK, Drawing, canvas, svg_of
from trt_kd.reporting.marks import HEIGHT, Place, write_names
from trt_kd.reporting.model import Report, Role, Variant
from trt_kd.reporting.readings import (
    first_workload,
    load_of,
    matching,
    mean_accuracy,
    mean_accuracy_stderr,
)
from trt_kd.reporting.speed_figures import COLOURS, load_figures, report_curves, speed_figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    ]  # fmt: skip
    curves = report_curves(report)
    found = [drawing for drawing in drawn if drawing is not None]
    return found + speed_figures(curves) + load_figures(curves)


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
        axes.set_xlabel(f"ITL p50 at {load_of(workload)} (ms), lower is better")
        axes.set_ylabel(label)
        axes.set_xlim(0, 1.28 * max(mark.latency for mark in marks))
        axes.margins(y=0.18)
        places = [Place(m.name, m.latency, m.quality, 1.96 * m.stderr) for m in marks]
        write_names(figure, axes, places, [[(m.latency, m.quality) for m in front]])
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
