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
from trt_kd.training.alarms import AlarmName
from trt_kd.training.features import Feature
from trt_kd.training.monitors import MonitorConfig


class Schedule(StrictModel):
    """AdamW under a cosine, for a stage's settings to inherit."""

    steps: PositiveInt = 100
    """Optimizer steps."""
    batch_size: PositiveInt = 4
    """Sequences of one forward and backward pass."""
    gradient_accumulation: PositiveInt = 1
    """Passes of one step."""
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
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Order of the text, and the trainer's generators."""
    monitor: MonitorConfig | None = MonitorConfig()
    """Measurements on held-out text while training; null leaves them out."""
    features: list[Feature] = []
    """Losses between layers of student and teacher, beside the one between their logits."""
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
