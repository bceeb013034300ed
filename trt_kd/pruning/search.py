"""Which sizes to try: every legal candidate that fits, ranked by what its cuts will cost."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field, PositiveInt
from typing_extensions import Self

from trt_kd.architectures.shape import ModelShape
from trt_kd.config import StrictModel
from trt_kd.errors import ModelError
from trt_kd.pruning.base import Axis
from trt_kd.pruning.candidates import Candidate
from trt_kd.pruning.halving import Tournament
from trt_kd.pruning.sensitivity import Point, curves, predicted_nats


class Search(StrictModel):
    """How one of many candidates is chosen; names are those of ``mcore_minitron``."""

    top_k: PositiveInt = 5
    """Candidates, the best predictions first, that are pruned, refit and measured."""
    max_width_pruning: float = Field(default=0.4, gt=0, lt=1)
    """Largest share of any width that may go."""
    max_depth_pruning: float = Field(default=0.2, gt=0, lt=1)
    """Largest share of the layers that may go."""
    slack: float = Field(default=0.15, ge=0, lt=1)
    """Share of the budget that a candidate may leave unused."""
    check_tokens: PositiveInt = 4_096
    """Tokens of training text, behind the calibration text, on which candidates are measured."""
    tournament: Tournament | None = None
    """Short distillation of the best ones; null takes the one that measures best untrained."""

    def rehearsed(self, tokens: int) -> Self:
        """Two candidates of any size, measured on ``tokens``, with one step of training."""
        tournament = self.tournament and self.tournament.model_copy(
            update={"contestants": 2, "steps": 1, "batch_size": 1}
        )
        return self.model_copy(
            update={
                "top_k": 2,
                "max_width_pruning": 0.9,
                "max_depth_pruning": 0.9,
                "check_tokens": tokens,
                "tournament": tournament,
            }
        )


@dataclass(frozen=True)
class Ranked:
    """A candidate and the divergence predicted for it, in nats per token."""

    candidate: Candidate
    predicted_nats: float


def ranked(
    candidates: Sequence[Candidate], points: Sequence[Point], axes: Sequence[Axis], search: Search
) -> list[Ranked]:
    """Candidates within the limits of ``search``, the best prediction first, larger ones at a tie.

    A candidate that is smaller than another along every axis is left out: it cannot be better.

    Raises:
        ModelError: if an axis that a candidate cuts was never measured, or the limits leave none.
    """
    fitted = curves(points)
    missing = {axis.kind for one in candidates for axis in axes if _cut(one, axis)} - fitted.keys()
    if missing:
        raise ModelError(
            f"the scores know nothing of axis {', '.join(sorted(missing))}",
            hint="score the model again with every axis that the search may cut",
        )
    allowed = [one for one in candidates if _within(one, axes, search)]
    if candidates and not allowed:
        raise ModelError(
            f"none of the {len(candidates):,} candidates cuts at most "
            f"{search.max_width_pruning:.0%} of every width and {search.max_depth_pruning:.0%} of "
            "the layers",
            hint="raise search.max_width_pruning or max_depth_pruning, or open another axis",
        )
    found = [Ranked(one, predicted_nats(fitted, axes, one.original, one.shape)) for one in allowed]
    found.sort(key=lambda one: (one.predicted_nats, -one.candidate.parameters))
    return _largest(found, axes)


def _largest(found: Sequence[Ranked], axes: Sequence[Axis]) -> list[Ranked]:
    """Those that no other one exceeds or equals along all axes; order as before."""
    sizes = np.array([[axis.read(one.candidate.shape) for axis in axes] for one in found])
    kept: list[int] = []
    for index, mine in enumerate(sizes):
        # Whatever exceeds it is predicted at most as far off, so it comes before.
        if not (sizes[kept] >= mine).all(axis=1).any():
            kept.append(index)
    return [found[index] for index in kept]


def _cut(candidate: Candidate, axis: Axis) -> float:
    """Share of the axis that goes."""
    return 1.0 - axis.read(candidate.shape) / axis.read(candidate.original)


def _within(candidate: Candidate, axes: Sequence[Axis], search: Search) -> bool:
    for axis in axes:
        limit = search.max_depth_pruning if axis.unit == "layers" else search.max_width_pruning
        if axis.is_open and _cut(candidate, axis) > limit:
            return False
    return True


def open_axes(axes: Sequence[Axis]) -> list[Axis]:
    """Those whose size is left to the search."""
    return [axis for axis in axes if axis.is_open]


def name_of(pruned: ModelShape, axes: Sequence[Axis]) -> str:
    """A name for a candidate, from the sizes of its axes: ``ffn1152-depth27``."""
    return "-".join(f"{axis.kind}{axis.read(pruned)}" for axis in axes)
