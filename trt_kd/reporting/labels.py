"""Where names stand beside their marks: never on one another, the same every time.

All lengths are in pixels of one drawing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trt_kd.reporting.drawing import FONT_POINTS

Box = tuple[float, float, float, float]
"""Left, bottom, right and top."""

GAP_POINTS = 3.0
"""Least space between two names."""
RINGS = 7
"""Lines above and below a mark where its name may stand."""


@dataclass(frozen=True)
class Point:
    """A mark that needs its name beside it."""

    x: float
    y: float
    name: str


def place_labels(
    points: Sequence[Point], obstacles: Sequence[Box], frame: Box, *, pixels_per_point: float
) -> list[Box]:
    """One box per point, in their order, each at the best place that earlier ones left.

    Names keep ``GAP_POINTS`` from each other wherever there is room, then stay inside ``frame``,
    then off ``obstacles``, then near their marks.
    """
    gap = GAP_POINTS * pixels_per_point
    placed: list[Box] = []
    for point in points:
        boxes = list(_places(point, pixels_per_point))  # the best-liked first
        costs = [
            100 * sum(overlap(grown(box, gap), other) for other in placed)
            + 20 * (_area(box) - overlap(box, frame))
            + sum(overlap(box, other) for other in obstacles)
            + 3 * rank
            for rank, box in enumerate(boxes)
        ]
        placed.append(boxes[costs.index(min(costs))])
    return placed


def _places(point: Point, scale: float) -> Iterator[Box]:
    """Boxes around a mark, the best-liked first: beside it, then line by line above and below."""
    width = 0.56 * FONT_POINTS * scale * len(point.name)
    height = 1.3 * FONT_POINTS * scale
    beside = [(side, rise) for side in (9, -9) for rise in (0, 11, -11)]
    over = [(0, 15), (0, -15)]
    rises = [sign * 16 * ring for ring in range(1, RINGS + 1) for sign in (1, -1)]
    further = [(side, rise) for rise in rises for side in (14, -14, 0)]
    for dx, dy in (*beside, *over, *further):
        left = point.x + dx * scale - (0 if dx > 0 else width if dx < 0 else width / 2)
        bottom = point.y + dy * scale - height / 2
        yield (left, bottom, left + width, bottom + height)


def nearest(point: Point, box: Box) -> tuple[float, float]:
    """The place in ``box`` that is nearest to ``point``."""
    return min(max(point.x, box[0]), box[2]), min(max(point.y, box[1]), box[3])


def distance(point: Point, box: Box) -> float:
    """From ``point`` to ``box``."""
    x, y = nearest(point, box)
    return float(((x - point.x) ** 2 + (y - point.y) ** 2) ** 0.5)


def grown(box: Box, gap: float) -> Box:
    """``box`` with ``gap`` around it."""
    return (box[0] - gap, box[1] - gap, box[2] + gap, box[3] + gap)


def overlap(first: Box, second: Box) -> float:
    """Area that two boxes share."""
    wide = min(first[2], second[2]) - max(first[0], second[0])
    high = min(first[3], second[3]) - max(first[1], second[1])
    return max(0.0, wide) * max(0.0, high)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
