"""Figures of the search: what each axis costs, and how good the predictions were.

Axes differ in marker and colour, the winner is filled, so nothing hangs on colour alone.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from trt_kd.pruning.sensitivity import Curve, Point
from trt_kd.reporting import labels
from trt_kd.reporting.drawing import INK, Drawing, canvas, svg_of
from trt_kd.reporting.search_model import MeasuredCandidate, SizeSearch
from trt_kd.reporting.search_tables import by_measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

STYLES = (
    ("o", "#0087c7"), ("s", "#d55e00"), ("^", "#009e73"), ("D", "#cc79a7"), ("v", "#8a8a8a"),
    ("P", "#e69f00"), ("X", "#56b4e9"),
)  # fmt: skip
"""Marker and colour of the axes in turn."""
HEIGHT = 3.1
"""Inches, without the legend."""
LEGEND_ROW = 0.22
"""Inches of every row of the legend."""
STEPS = 60
"""Places at which a curve is drawn."""


def search_figures(search: SizeSearch) -> list[Drawing]:
    """Sensitivity curves, and predicted against measured, where there are numbers."""
    drawn = [_sensitivity(search), _predictions(search)]
    return [drawing for drawing in drawn if drawing is not None]


def _sensitivity(search: SizeSearch) -> Drawing | None:
    """Divergence against the share cut, a line for every axis."""
    found: dict[str, list[Point]] = {}
    for one in search.sensitivity:
        if one.kl_nats > 0:  # a logarithm has no place for the others
            point = Point(one.kind, one.size, one.present, one.kl_nats)
            found.setdefault(one.kind, []).append(point)
    if not found:
        return None
    shares = [point.share_cut for points in found.values() for point in points]
    title = "What each axis costs"
    with canvas(HEIGHT + LEGEND_ROW * -(-len(found) // 3)) as figure:
        axes = figure.subplots()
        for number, (kind, points) in enumerate(found.items()):
            _draw_curve(axes, kind, points, number, (min(shares), max(shares)))
        axes.set(xscale="log", yscale="log")
        _plain_ticks(axes.xaxis)
        _plain_ticks(axes.yaxis)
        axes.set_xlabel("share of the axis that is cut (%)")
        axes.set_ylabel("divergence (nats per token)")
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderpad=0,
            handletextpad=0.3, columnspacing=1.0,
        )  # fmt: skip
        svg = svg_of(figure, title)
    text = (
        f"{title}: marks are cuts of one axis alone, refit included; lines are what the "
        "predictions read, dashed beyond the marks. Both scales are logarithmic."
    )
    left_out = len(search.sensitivity) - len(shares)
    return Drawing(
        title, text + (" Cuts that cost nothing are not drawn." if left_out else ""), svg
    )


def _draw_curve(
    axes: "Axes", kind: str, points: Sequence[Point], number: int, reach: tuple[float, float]
) -> None:
    marker, colour = STYLES[number % len(STYLES)]
    curve, own = Curve(points), sorted(point.share_cut for point in points)
    for low, high, dashes in (
        (reach[0], own[0], (0, (2, 2))), (own[0], own[-1], "-"), (own[-1], reach[1], (0, (2, 2))),
    ):  # fmt: skip
        if high > low:
            places = np.geomspace(low, high, STEPS)
            axes.plot(
                100 * places, [curve(place) for place in places], color=colour, linewidth=1.5,
                linestyle=dashes,
            )  # fmt: skip
    axes.plot(
        [100 * point.share_cut for point in points], [point.kl_nats for point in points],
        linestyle="none", marker=marker, markersize=6, color=colour, label=kind.replace("_", " "),
        zorder=3,
    )  # fmt: skip


def _plain_ticks(axis: "Axis") -> None:
    """Ticks of a logarithmic scale as plain numbers, fewer where it is long."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axis.get_data_interval()
    span = high / low
    subs = (1, 2, 3, 5) if span < 10 else (1, 2, 5) if span < 1_000 else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(NullLocator())


def _predictions(search: SizeSearch) -> Drawing | None:
    """Predicted against measured divergence of every measured candidate."""
    ordered = by_measurement(search)
    if not ordered:
        return None
    title = "Predicted against measured"
    with canvas(HEIGHT) as figure:
        axes = figure.subplots()
        for one in ordered:
            won = one.name == search.winner
            axes.errorbar(
                one.predicted_nats, one.divergence_nats, yerr=1.96 * one.divergence_stderr_nats,
                fmt="D" if won else "o", markersize=7, color="#0087c7", markeredgewidth=1.6,
                markerfacecolor="#0087c7" if won else "none", elinewidth=1.2, zorder=3,
            )  # fmt: skip
        low, high = _reach(ordered)
        axes.plot([low, high], [low, high], color=INK, linewidth=1, linestyle=(0, (4, 3)),
                  alpha=0.6, zorder=1)  # fmt: skip
        axes.set(xlim=(low, high), ylim=(low, high))
        axes.locator_params(nbins=6)
        axes.set_xlabel("predicted (nats per token)")
        axes.set_ylabel("measured (nats per token)")
        _number(figure, axes, [(x.predicted_nats, x.divergence_nats) for x in ordered])
        svg = svg_of(figure, title)
    filled = " The winner is filled." if search.winner else ""
    text = (
        f"{title} divergence of the candidates, numbered by their places in the table. Bars: 95 % "
        f"intervals. Dashed: where both are the same.{filled}"
    )
    return Drawing(title, text, svg)


def _reach(candidates: Sequence[MeasuredCandidate]) -> tuple[float, float]:
    """Where both axes begin and end: around every mark and the whole of its bar."""
    ends = [
        end
        for one in candidates
        for end in (
            one.predicted_nats,
            one.divergence_nats - 1.96 * one.divergence_stderr_nats,
            one.divergence_nats + 1.96 * one.divergence_stderr_nats,
        )
    ]
    room = 0.06 * (max(ends) - min(ends)) or 0.1 * abs(ends[0]) or 1.0
    return min(ends) - room, max(ends) + room


def _number(figure: "Figure", axes: "Axes", places: Sequence[tuple[float, float]]) -> None:
    """Write 1, 2, 3 beside the marks, none over another."""
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    pixels = [axes.transData.transform(place) for place in places]
    points = [
        labels.Point(float(x), float(y), str(number)) for number, (x, y) in enumerate(pixels, 1)
    ]
    reach = 6 * scale
    marks = [(p.x - reach, p.y - reach, p.x + reach, p.y + reach) for p in points]
    frame = axes.get_window_extent()
    inside = (frame.x0, frame.y0, frame.x1, frame.y1)
    boxes = labels.place_labels(points, marks, inside, pixels_per_point=scale)
    to_data = axes.transData.inverted().transform
    for point, box in zip(points, boxes, strict=True):
        x, y = to_data(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))
        text = axes.text(x, y, point.name, ha="center", va="center_baseline", zorder=4)
        text.set_in_layout(False)
