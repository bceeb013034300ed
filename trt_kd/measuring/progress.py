"""How far a long loop is: a bar, or log lines where there is no terminal for one."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

from typing_extensions import Self

T = TypeVar("T")

logger = logging.getLogger(__name__)

LOG_EVERY_S = 60.0
"""Where there is no terminal for a bar, a line comes at least this often, and at both ends."""


class Steps:
    """Counts the steps of a loop; a context manager."""

    def __init__(self, doing: str, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        """``doing`` says what a step is a part of, such as ``scoring``."""
        from tqdm import tqdm

        self._doing, self._total, self._clock = doing, total, clock
        self._bar: Any = tqdm(total=total, desc=doing, disable=None)
        self._done = 0
        self._started = clock()
        self._logged = self._started - LOG_EVERY_S

    def __enter__(self) -> Self:
        """Start."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the bar as it stands."""
        self._bar.close()

    def step(self) -> None:
        """One more is done."""
        self._bar.update()
        self._done += 1
        now = self._clock()
        last = self._done == self._total
        if self._bar.disable and (last or now - self._logged >= LOG_EVERY_S):
            self._logged = now
            spent_s = now - self._started
            left_s = spent_s / self._done * (self._total - self._done)
            rest = f"{spent_s:.0f} s" if last else f"{left_s:.0f} s left"
            logger.info("%s %d of %d, %s", self._doing, self._done, self._total, rest)


def progress(items: Sequence[T], doing: str) -> Iterator[T]:
    """Go through ``items`` and show how far; a step ends when the next item is asked for."""
    with Steps(doing, len(items)) as steps:
        for item in items:
            yield item
            steps.step()
