"""Whose turn it is: variants in ABBA order, workload by workload, on rows that never repeat.

Drift of the machine then meets all variants alike, and each round gives one pair of numbers to
every two variants. A workload is warm once every variant's last three runs agree.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from trt_kd.measuring.clock import Workload


@dataclass(frozen=True)
class Turn:
    """One run of one variant."""

    variant: str
    workload: Workload
    repeat: int
    """Counts from 0; -1 in warm-up."""
    rows: slice
    """Which prompts, of all that were cut."""

    @property
    def key(self) -> tuple[str, Workload]:
        """Variant and workload."""
        return self.variant, self.workload


@dataclass(frozen=True)
class Rounds:
    """What is run how often."""

    workloads: tuple[Workload, ...]
    """Measured from the first to the last."""
    repeats: int
    """Rounds that count."""
    warmup: int = 0
    """Most rounds before, on rows of their own, used again in each of them."""

    @property
    def rows(self) -> int:
        """Prompts that all rounds together need."""
        each = self.repeats + (self.warmup > 0)
        return each * sum(workload.batch_size for workload in self.workloads)

    def turns(
        self, names: Sequence[str], is_warm: Callable[[Workload], bool] = lambda _: False
    ) -> Iterator[Turn]:
        """Every run in its order, workload by workload; see ``turns_at``."""
        for place in range(len(self.workloads)):
            yield from self.turns_at(place, names, is_warm)

    def turns_at(
        self,
        place: int,
        names: Sequence[str],
        is_warm: Callable[[Workload], bool] = lambda _: False,
    ) -> Iterator[Turn]:
        """Every run of one workload: A B, then B A, and so on; all of a round get the same rows.

        Its rows are its own, whichever other workloads are run. ``is_warm`` is asked after each
        round of warm-up whether the workload may count now.
        """
        workload = self.workloads[place]
        size = workload.batch_size
        used = Rounds(self.workloads[:place], self.repeats, self.warmup).rows
        done = 0
        for done in count():
            if done >= self.warmup or (done and is_warm(workload)):
                break
            yield from _round(names, done, workload, -1, slice(used, used + size))
        used += size * (self.warmup > 0)
        for repeat in range(self.repeats):
            yield from _round(names, done + repeat, workload, repeat, slice(used, used + size))
            used += size


def _round(
    names: Sequence[str], number: int, workload: Workload, repeat: int, rows: slice
) -> Iterator[Turn]:
    for name in names if number % 2 == 0 else reversed(names):
        yield Turn(name, workload, repeat, rows)
