"""How long, how fast and how precisely to train."""

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from typing_extensions import Self

from trt_kd.config import StrictModel
from trt_kd.errors import ConfigError
from trt_kd.training.alarms import AlarmName
from trt_kd.training.balance import Balance
from trt_kd.training.escalation import Escalation
from trt_kd.training.exits import Exits
from trt_kd.training.features import Feature
from trt_kd.training.monitors import MonitorConfig
from trt_kd.training.on_policy import OnPolicy


class Schedule(StrictModel):
    """AdamW under a cosine, for a stage's settings to inherit."""

    steps: PositiveInt = 100
    """Optimizer steps."""
    batch_size: PositiveInt = 4
    """Sequences of one forward and backward pass of one process."""
    gradient_accumulation: PositiveInt = 1
    """Passes of one step, which all processes share: a multiple of their count."""
    learning_rate: PositiveFloat = 2e-4
    """Peak of the cosine; a student that starts well wants a small one."""
    warmup_steps: NonNegativeInt = 0
    """Steps on which the learning rate rises from zero; fewer than ``steps``."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's, on weight matrices only."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the matrix products; weights, sums and losses are float32."""
    checkpoint_every_steps: PositiveInt = 50
    """Steps that a kill costs at most; a checkpoint takes 12 bytes per parameter."""
    gradient_checkpointing: bool = False
    """Keep the input of every layer and compute the rest again on the way back: the same
    gradients with less memory, for one more forward pass."""
    sharding: Annotated[Literal["none", "fsdp2"], Field(exclude=True)] = "none"
    """``fsdp2`` splits weights, gradients, optimizer state and teacher over the processes; else
    every process holds them all. The result is the same, so it is no part of a run's identity."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Order of the text, and the trainer's generators."""
    monitor: MonitorConfig | None = MonitorConfig()
    """Measurements on held-out text while training; null leaves them out."""
    features: list[Feature] = []
    """Losses between layers of student and teacher, beside the one between their logits."""
    features_if: Escalation | None = None
    """Let features join later, and only if a gap remains; from the first step if left out."""
    exits: Exits | None = None
    """Layers of the student that learn from its own output; none if left out."""
    balance: Balance | None = None
    """Weigh the terms by the norms of their gradients; as plain factors if left out."""
    on_policy: OnPolicy | None = None
    """Steps that learn from what the student writes itself; none if left out."""
    stop_on: Annotated[list[AlarmName], Field(exclude=True)] = []
    """Alarms that stop the run with its checkpoint kept. No part of a run's identity: without it,
    a stopped run goes on."""

    @model_validator(mode="after")
    def _warms_up_in_time(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}")
        return self

    @property
    def sequences(self) -> int:
        """Token blocks that the run reads."""
        return self.steps * self.batch_size * self.gradient_accumulation

    def passes(self, processes: int) -> int:
        """Passes of one step on each of so many processes.

        Raises:
            ConfigError: if they cannot be shared evenly, there is nothing to shard over, or what
                one process learns, features and their balance, is asked of more.
        """
        alone = {"features": self.features, "balance": self.balance}
        for name, wanted in alone.items():
            if wanted and processes > 1:
                raise ConfigError(
                    f"{name}: learnt in one process, {processes} were started",
                    hint=f"start it without a launcher, or leave {name} out",
                )
        if self.gradient_accumulation % processes:
            raise ConfigError(
                f"gradient_accumulation {self.gradient_accumulation} cannot be shared by "
                f"{processes} processes",
                hint=f"set it to a multiple of {processes}; batch_size times "
                "gradient_accumulation are the sequences of a step, whoever reads them",
            )
        if self.sharding != "none" and processes == 1:
            raise ConfigError(
                f"sharding: {self.sharding} has no effect in one process",
                hint="leave it out, or start with torchrun --nproc-per-node N -m trt_kd.cli",
            )
        return self.gradient_accumulation // processes
