"""Marks and lines with their names beside them, drawn the same in every figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from trt_kd.reporting.drawing import INK, Drawing, canvas, svg_of
from trt_kd.reporting.labels import Box, Point, distance, nearest, place_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEIGHT = 3.3
"""Inches."""
FAR_POINTS = 14.0
"""From here on a name needs a line to its mark."""

Line = list[tuple[float, float]]
"""Corners of a line, in the units of the axes."""


@dataclass(frozen=True)
class Place:
    """Where a mark stands, and how far its bar reaches to both sides."""

    name: str
    x: float
    y: float
    reach: float = 0.0


@dataclass(frozen=True)
class Series:
    """One line with a mark at each of its points; ``name`` stands at its end."""

    name: str
    colour: str
    points: Line
    markers: Sequence[str]
    """Of every point."""
    dashed: bool = False
    reach: Sequence[float] | None = None
    """Half the length of every point's bar."""


@dataclass(frozen=True)
class Plane:
    """What the two axes say."""

    x: str
    y: str
    logarithmic: bool = False
    """Whether x doubles from tick to tick; the ticks are then where the points are."""
    top: float | None = None
    """Where y ends at least."""


def line_drawing(title: str, text: str, series: Sequence[Series], plane: Plane) -> Drawing | None:
    """Every line with its name; None where no line has two points."""
    if all(len(one.points) < 2 for one in series):
        return None
    with canvas(HEIGHT) as figure:
        axes = figure.subplots()
        for one in series:
            _draw(axes, one)
        axes.set_xlabel(plane.x)
        axes.set_ylabel(plane.y)
        values = sorted({x for one in series for x, _ in one.points})
        if plane.logarithmic:
            _doubling(axes, values)
        else:
            axes.set_xlim(0, 1.35 * values[-1])
        axes.set_ylim(0, plane.top)
        ends = [Place(one.name, *one.points[-1]) for one in series if one.name]
        write_names(figure, axes, ends, [one.points for one in series])
        svg = svg_of(figure, title)
    return Drawing(title, f"{title}. {text}", svg)


def _draw(axes: "Axes", one: Series) -> None:
    xs, ys = zip(*one.points, strict=True)
    axes.errorbar(
        xs, ys, yerr=one.reach, color=one.colour, linewidth=1.6, elinewidth=1.2,
        linestyle=(0, (4, 3)) if one.dashed else "-",
    )  # fmt: skip
    for (x, y), marker in zip(one.points, one.markers, strict=True):
        axes.plot(x, y, color=one.colour, marker=marker, markersize=6, linestyle="none")


def _doubling(axes: "Axes", values: list[float]) -> None:
    """A logarithmic axis with a tick at each of ``values``, and room for the names."""
    from matplotlib.ticker import NullLocator

    low, high = values[0], values[-1]
    axes.set_xscale("log", base=2)
    axes.set_xlim(low / 1.25, high * max(2.0, (high / low) ** 0.45))
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.xaxis.set_minor_locator(NullLocator())


def write_names(
    figure: "Figure", axes: "Axes", marks: Sequence[Place], lines: Sequence[Line]
) -> None:
    """Write each name beside its mark, with a thin line to it where it had to go further off."""
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    frame = axes.get_window_extent()
    places = [axes.transData.transform((mark.x, mark.y)) for mark in marks]
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


def _obstacles(
    axes: "Axes", marks: Sequence[Place], lines: Sequence[Line], scale: float
) -> list[Box]:
    """What a name should not cover: marks, their bars, and ``lines``."""
    to_pixels = axes.transData.transform
    boxes = []
    for mark in marks:
        x, y = to_pixels((mark.x, mark.y))
        reach = to_pixels((mark.x, mark.y + mark.reach))[1] - y
        for wide, high in ((6 * scale, 6 * scale), (scale, reach)):
            boxes.append((x - wide, y - high, x + wide, y + high))
    for first, second in (ends for line in lines for ends in pairwise(line)):
        (x0, y0), (x1, y1) = to_pixels(first), to_pixels(second)
        for step in range(60):
            x, y = x0 + (x1 - x0) * step / 60, y0 + (y1 - y0) * step / 60
            boxes.append((x - scale, y - scale, x + scale, y + scale))
    return boxes
