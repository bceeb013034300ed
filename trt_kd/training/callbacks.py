"""What happens beside a step: progress, TensorBoard, the marker of a complete checkpoint."""

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trt_kd.training.checkpointing import PREFIX, mark_complete, remove_older
from trt_kd.training.distributed import Processes
from trt_kd.training.history import log_of

logger = logging.getLogger(__name__)

LOG_EVERY_S = 60.0
"""Where there is no terminal for a bar, a line comes at least this often."""


class MarkCheckpoints(TrainerCallback):
    """Mark every checkpoint once it is whole on disk, then remove the older ones."""

    def __init__(self, checkpoints: Path, processes: Processes) -> None:
        self.checkpoints = checkpoints
        self.processes = processes

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mark and tidy up; called after this process wrote its last file of a checkpoint."""
        self.processes.wait()
        self.processes.share(lambda: self._mark(state.global_step))

    def _mark(self, step: int) -> None:
        newest = self.checkpoints / f"{PREFIX}{step}"
        mark_complete(newest)
        remove_older(self.checkpoints, newest)


class Progress(TrainerCallback):
    """A bar with loss, tokens/s and time left; log lines where there is no terminal."""

    def __init__(self, tokens_per_step: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.tokens_per_step = tokens_per_step
        self.clock = clock
        self._bar: Any = None
        self._first_step = 0
        self._started = self._logged = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the bar where a resumed run stands."""
        self._first_step = state.global_step
        self._started = self.clock()
        self._logged = -LOG_EVERY_S
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="train",
            unit="step",
            disable=None,
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the step just made."""
        if not logs or "loss" not in logs or self._bar is None:
            return
        now, done = self.clock(), state.global_step - self._first_step
        step_s = max(now - self._started, 1e-9) / max(done, 1)
        rate = self.tokens_per_step / step_s
        self._bar.set_postfix_str(f"loss {logs['loss']:.4f}, {rate:,.0f} tokens/s", refresh=False)
        self._bar.update(state.global_step - self._bar.n)
        last = state.global_step >= state.max_steps
        if self._bar.disable and (last or now - self._logged >= LOG_EVERY_S):
            self._logged = now
            left_s = (state.max_steps - state.global_step) * step_s
            logger.info(
                "step %d of %d: loss %.4f, %.0f tokens/s, %.0f s left",
                state.global_step,
                state.max_steps,
                logs["loss"],
                rate,
                left_s,
            )

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


class EventFiles(TrainerCallback):
    """TensorBoard's event file of every value of every step, without names of machine or folder.

    A resumed run writes the file anew from the log, so that no step stands in it twice.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._writer: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the file with what is in the log already."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self._writer = SummaryWriter(str(self.directory))
        for entry in state.log_history:
            self._write(entry)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the newest entry of the log."""
        self._write(state.log_history[-1])

    def close(self) -> None:
        """Finish the file and give it a plain name: TensorBoard's holds host and process."""
        if self._writer is not None:
            self._writer.close()
            for number, path in enumerate(sorted(self.directory.glob("*tfevents*"))):
                path.rename(self.directory / f"events.out.tfevents.{number}")

    def _write(self, entry: dict[str, Any]) -> None:
        log = log_of([entry])
        for group, rows in (("train", log.steps), ("monitor", log.measured)):
            for row in rows:
                for name, value in row.items():
                    if name != "step":
                        self._writer.add_scalar(f"{group}/{name}", value, int(row["step"]))
        self._writer.flush()
