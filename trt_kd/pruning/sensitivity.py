"""What cutting one axis costs, at any size, from a few sizes that were measured.

A point is a cut of one axis alone, refit included, and how far it moved the model: the mean
Kullback-Leibler divergence D from the unpruned model in nats per token. Between points log D is
linear in the log of the share r that was cut (small perturbations move D as their square), beyond
them the nearest line goes on. Cuts of several axes are taken to add up, which ranks candidates
well and predicts their D roughly: what is chosen is measured.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trt_kd.architectures import architecture_of
from trt_kd.architectures.shape import ModelShape
from trt_kd.errors import ModelError
from trt_kd.pruning.base import Axis

SHARES = (1 / 12, 1 / 6, 1 / 3, 1 / 2)
"""Shares of an axis that are cut to see what that costs."""
EXPONENT = 2.0
"""Growth of D with the share cut where a single point cannot tell."""
FILE = "sensitivity.json"
_SMALLEST_NATS = 1e-9


@dataclass(frozen=True)
class Point:
    """One axis cut to one size, all else as it was."""

    kind: str
    """Kind of the axis."""
    size: int
    """Its size after the cut, as the axis counts."""
    present: int
    """Its size before."""
    kl_nats: float
    """Mean divergence from the unpruned model, in nats per token."""

    @property
    def share_cut(self) -> float:
        """Share of the units that went."""
        return 1.0 - self.size / self.present


def sizes_to_measure(axis: Axis, shape: ModelShape, count: int = len(SHARES)) -> list[int]:
    """At most ``count`` sizes of ``axis`` that its curve needs, descending.

    They lie nearest to even steps on a logarithmic scale, up to half of the axis, among the sizes
    on its grid that the family's stock code takes.
    """
    architecture, present = architecture_of(shape.model_type), axis.read(shape)
    legal = [
        size
        for size in axis.legal(shape)
        if size < present and architecture.takes(axis.write(shape, size))
    ]
    if not legal:
        return []
    wanted = [present * (1.0 - share) for share in SHARES[-count:]]
    return sorted({_nearest(legal, goal) for goal in wanted}, reverse=True)


def _nearest(sizes: Sequence[int], goal: float) -> int:
    return min(sizes, key=lambda size: abs(size - goal))


class Curve:
    """D of one axis as a function of the share cut."""

    def __init__(self, points: Iterable[Point]) -> None:
        """Fit a curve through ``points`` of one axis; D never falls as more is cut.

        Raises:
            ValueError: if there is no point.
        """
        known = sorted((point.share_cut, point.kl_nats) for point in points)
        if not known:
            raise ValueError("a curve needs at least one point")
        self._logs: list[tuple[float, float]] = []
        highest = _SMALLEST_NATS
        for share, nats in known:
            highest = max(highest, nats)
            self._logs.append((math.log(share), math.log(highest)))

    def __call__(self, share_cut: float) -> float:
        """D in nats per token after a cut of ``share_cut`` of the axis."""
        if share_cut <= 0.0:
            return 0.0
        where = math.log(share_cut)
        (x0, y0), (x1, y1) = self._segment(where)
        slope = EXPONENT if x0 == x1 else (y1 - y0) / (x1 - x0)
        return math.exp(y0 + slope * (where - x0))

    def _segment(self, where: float) -> tuple[tuple[float, float], tuple[float, float]]:
        if len(self._logs) == 1:
            return self._logs[0], self._logs[0]
        inner = self._logs[1:-1]
        index = sum(x <= where for x, _ in inner)
        return self._logs[index], self._logs[index + 1]


def curves(points: Sequence[Point]) -> dict[str, Curve]:
    """One curve per kind of axis that has a point."""
    kinds = dict.fromkeys(point.kind for point in points)
    return {kind: Curve(point for point in points if point.kind == kind) for kind in kinds}


def predicted_nats(
    fitted: Mapping[str, Curve], axes: Sequence[Axis], original: ModelShape, pruned: ModelShape
) -> float:
    """D that the curves add up to for a model of shape ``pruned``, in nats per token."""
    total = 0.0
    for axis in axes:
        share_cut = 1.0 - axis.read(pruned) / axis.read(original)
        if share_cut > 0.0:
            total += fitted[axis.kind](share_cut)
    return total


def write_points(points: Sequence[Point], folder: Path) -> None:
    """Write ``sensitivity.json`` into ``folder``."""
    text = json.dumps([asdict(point) for point in points], indent=2)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def read_points(folder: Path) -> list[Point]:
    """Read what ``write_points`` wrote.

    Raises:
        ModelError: if there is no such file.
    """
    path = folder / FILE
    if not path.is_file():
        raise ModelError(f"{folder} holds no {FILE}", hint="make it with trt-kd score")
    return [Point(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
