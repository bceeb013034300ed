"""Monitors and alarms while a run trains."""

import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trt_kd.errors import TrtKdError
from trt_kd.training.alarms import Alarm, AlarmName, Watch
from trt_kd.training.heldout import layer_gradient_norms
from trt_kd.training.history import MEASURED, log_of
from trt_kd.training.monitors import MonitorConfig

logger = logging.getLogger(__name__)


class Monitor(TrainerCallback):
    """Measure the student before the first step, every few steps and at the end.

    Of several processes every one measures the same blocks, and takes what the first one found.
    """

    def __init__(
        self,
        config: MonitorConfig,
        trainer: Any,
        blocks: NDArray[np.int64],
        counted: NDArray[np.bool_] | None = None,
    ) -> None:
        self.config = config
        self.trainer = trainer
        self.blocks = blocks
        self.counted = counted
        self._norms: dict[str, float] = {}
        self._seconds = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the untrained student; a resumed run has that in its log."""
        if state.global_step == 0:
            self._measure(args)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Note the gradients of a step that will be measured: they are gone when it is logged."""
        if model is not None and self.config.due(state.global_step + 1, state.max_steps):
            start = time.monotonic()
            self._norms = layer_gradient_norms(model.named_parameters())
            self._seconds = time.monotonic() - start

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Measure after the row of the step is written."""
        if logs and "loss" in logs and self.config.due(state.global_step, state.max_steps):
            self._measure(args, logs.get("grad_norm"))

    def _measure(self, args: TrainingArguments, grad_norm: float | None = None) -> None:
        start = time.monotonic()
        found = self.trainer.measure(self.blocks, args.per_device_train_batch_size, self.counted)
        total = sum(norm**2 for norm in self._norms.values()) ** 0.5
        if grad_norm is not None and total > 0:
            # They were noted after clipping; the step's norm is that before it.
            found |= {f"grad_norm_{n}": x * grad_norm / total for n, x in self._norms.items()}
        seconds = self._seconds + time.monotonic() - start
        self._norms, self._seconds = {}, 0.0
        self.trainer.log(self.trainer.agreed({**found, MEASURED: seconds}))


class Alarms(TrainerCallback):
    """Say once when an alarm is raised; stop with a checkpoint where that was asked for."""

    def __init__(self, stop_on: Sequence[AlarmName] = ()) -> None:
        self.stop_on = stop_on
        self.watch = Watch()
        self.stopped: tuple[Alarm, int] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up what a resumed run saw before.

        Raises:
            TrtKdError: if it was stopped, and still is to be.
        """
        for entry in state.log_history:
            self._see(entry)
        self.check()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the newest row."""
        raised, step = self._see(state.log_history[-1]), state.global_step
        for alarm in raised if state.is_world_process_zero else []:
            logger.warning(
                "alarm %s at step %d: %s; %s", alarm.name, step, alarm.says, alarm.advice
            )
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def check(self) -> None:
        """Say in the end that the run was stopped.

        Raises:
            TrtKdError: if it was.
        """
        if self.stopped:
            alarm, step = self.stopped
            raise TrtKdError(
                f"training stopped at step {step} by the alarm {alarm.name}: {alarm.says}",
                hint=f"{alarm.advice}; or take {alarm.name} out of stop_on and run again to go on "
                "from the checkpoint of that step",
            )

    def _see(self, entry: dict[str, Any]) -> list[Alarm]:
        log = log_of([entry])
        raised = [alarm for row in log.steps for alarm in self.watch.step(row)]
        raised += [alarm for row in log.measured for alarm in self.watch.measurement(row)]
        for alarm in raised:
            if alarm.name in self.stop_on and self.stopped is None:
                self.stopped = alarm, self.watch.fired[alarm.name]
        return raised
