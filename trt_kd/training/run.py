"""Where and with whom one training run is made."""

from dataclasses import dataclass
from pathlib import Path

from trt_kd.training.distributed import Processes
from trt_kd.training.schedule import Schedule


@dataclass(frozen=True)
class Run:
    """How to train, where state that outlives a kill goes, and among which processes."""

    schedule: Schedule
    work: Path
    processes: Processes = Processes()  # noqa: RUF009 - frozen
    end: int | None = None
    """Token after which another document begins; None where a block is one text."""
