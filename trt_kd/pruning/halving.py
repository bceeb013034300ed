"""Successive halving: train all contestants a little, keep the better half, train on.

Source: Jamieson and Talwalkar 2016 (arXiv:1502.07943). Contestants are compared block by block on
the same held-out text, so that what makes a block hard cancels in their difference.

Shape suffixes: B blocks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field, PositiveFloat, PositiveInt

from trt_kd.config import StrictModel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_RESAMPLES = 2_000
_CONFIDENCE = 0.95


class Tournament(StrictModel):
    """Short distillation of the best candidates on one cache of the teacher's logits."""

    contestants: int = Field(default=4, ge=2)
    """Candidates of the first round, the best measured ones; fewer if the search keeps fewer."""
    steps: PositiveInt = 20
    """Optimizer steps of the first round; every later round has half the contestants and twice the
    steps, which go on from the round before."""
    batch_size: PositiveInt = 4
    """Sequences of one step."""
    learning_rate: PositiveFloat = 1e-4
    """Peak of every round's cosine, reached after a fifth of the steps."""
    top_k: PositiveInt = 64
    """Likeliest tokens of which the teacher's log-probabilities are kept; the rest as one sum."""

    def rounds(self, contestants: int) -> list[tuple[int, int]]:
        """Contestants and steps of every round until two have met.

        Raises:
            ValueError: if there are fewer than two contestants.
        """
        if contestants < 2:
            raise ValueError(f"a tournament needs two contestants at least, not {contestants}")
        found, count, steps = [], min(contestants, self.contestants), self.steps
        while True:
            found.append((count, steps))
            if count == 2:
                return found
            count, steps = max(2, -(-count // 2)), 2 * steps

    def sequences(self) -> int:
        """Token blocks that a contestant of every round reads."""
        return self.batch_size * sum(steps for _, steps in self.rounds(self.contestants))

    def trained_sequences(self) -> int:
        """Token blocks that all contestants together read."""
        rounds = self.rounds(self.contestants)
        return self.batch_size * sum(count * steps for count, steps in rounds)


@dataclass(frozen=True)
class Comparison:
    """How much further one contestant is from the teacher than another, block by block."""

    difference_nats: float
    """Mean divergence of the first less that of the second, in nats per token."""
    low_nats: float
    high_nats: float
    """Two-sided 95 % t-interval over blocks."""

    @property
    def verdict(self) -> str:
        """``better`` if the first is closer to the teacher, ``worse`` if further, else ``same``."""
        if self.high_nats < 0.0:
            return "better"
        return "worse" if self.low_nats > 0.0 else "same"

    def as_dict(self) -> dict[str, Any]:
        """For a manifest."""
        return {**vars(self), "verdict": self.verdict}


def compared(first_B: "NDArray[np.float64]", second_B: "NDArray[np.float64]") -> Comparison:
    """Compare two contestants on the same blocks.

    Raises:
        ValueError: if there are fewer than two blocks.
    """
    from scipy.stats import ttest_rel

    if len(first_B) < 2:
        raise ValueError("an interval needs two blocks at least")
    mean = float((first_B - second_B).mean())
    if (first_B - second_B).std() == 0.0:  # the t statistic divides by it
        return Comparison(mean, mean, mean)
    interval = ttest_rel(first_B, second_B).confidence_interval(_CONFIDENCE)
    return Comparison(mean, float(interval.low), float(interval.high))


def order(divergences: "Mapping[str, NDArray[np.float64]]") -> list[str]:
    """Names, the one closest to the teacher first; the earlier name wins a tie."""
    return sorted(divergences, key=lambda name: float(divergences[name].mean()))


def leader_share(divergences: "Mapping[str, NDArray[np.float64]]", *, seed: int = 0) -> float:
    """How often the leader still leads when the blocks are drawn anew with replacement."""
    import numpy as np

    names = list(divergences)
    table_NB = np.stack([divergences[name] for name in names])
    blocks = table_NB.shape[1]
    drawn = np.random.default_rng(seed).integers(0, blocks, size=(_RESAMPLES, blocks))
    means_NR = table_NB[:, drawn].mean(axis=-1)
    leader = names.index(order(divergences)[0])
    return float((means_NR.argmin(axis=0) == leader).mean())


def rank_agreement(one: Sequence[str], other: Sequence[str]) -> float | None:
    """Kendall's tau between two orders of the names they share; None for fewer than two."""
    from scipy.stats import kendalltau

    shared = [name for name in one if name in other]
    if len(shared) < 2:
        return None
    return float(kendalltau(range(len(shared)), [other.index(name) for name in shared]).statistic)
