"""Teacher correction: a light fine-tune of the teacher on the text that it will teach.

Source: Sreenivas et al. 2024 (arXiv:2408.11796): where the teacher's own training text is not at
hand, adapting it to the distillation text first makes it a better teacher on that text.
"""

from pydantic import PositiveFloat
from typing_extensions import Self

from trt_kd.data.base import DataConfig
from trt_kd.stages.distill import DistillConfig
from trt_kd.teachers.online import OnlineTeacher
from trt_kd.training.schedule import Schedule


class Correction(Schedule):
    """How long and how fast the teacher learns the distillation text, by plain cross-entropy."""

    learning_rate: PositiveFloat = 2e-5
    """Peak of the cosine; small, for the teacher is to adapt and not to forget."""

    def training(self, data: DataConfig) -> DistillConfig:
        """Settings of the stage that trains the teacher on ``data``."""
        schedule = {name: getattr(self, name) for name in Schedule.model_fields}
        return DistillConfig(
            **schedule, data=data, task_weight=1.0, response_weight=0.0, teacher=OnlineTeacher()
        )

    def rehearsal(self) -> Self:
        """Two steps of one sequence, a checkpoint after each."""
        shortest = self.training(DataConfig()).rehearsal()
        return self.model_copy(
            update={name: getattr(shortest, name) for name in Schedule.model_fields}
        )
