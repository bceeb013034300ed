"""On what, where and with whom one training run is made."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trt_kd.training.distributed import Processes
from trt_kd.training.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Tasks:
    """What the tokens of a text are learnt for; the losses of tasks are logged apart."""

    of: "NDArray[np.int8]"
    """``[count, L]``: number of every token's task, counted from 1; 0 where it is not learnt."""
    weights: "Mapping[str, float]"
    """How often the mean over the tokens of a task counts in the task term, by the task's name, in
    the order of the numbers."""


@dataclass(frozen=True)
class Text:
    """Token blocks ``[count, L]``."""

    blocks: "NDArray[np.int64]"
    """Those to train on, in order."""
    heldout: "NDArray[np.int64] | None" = None
    """Those that the monitor measures on; without them there is none."""
    weights: "NDArray[np.float32] | None" = None
    """``[count, L]``: how often a token of ``blocks`` counts in the task term, 0 where it is not
    learnt at all; every token counts once without."""
    counted: "NDArray[np.bool_] | None" = None
    """Which tokens of ``heldout`` are measured; all of them without."""
    tasks: Tasks | None = None
    """What the tokens of ``blocks`` are learnt for; all for one thing without."""


@dataclass(frozen=True)
class Run:
    """How to train, where state that outlives a kill goes, and among which processes."""

    schedule: Schedule
    work: Path
    processes: Processes = Processes()  # noqa: RUF009 - frozen
    end: int | None = None
    """Token after which another document begins; None where a block is one text."""
    tokenizer: Path | None = None
    """Folder of the student's tokenizer, for what needs more than token ids."""
