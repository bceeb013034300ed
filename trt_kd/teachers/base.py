"""What a teacher is."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trt_kd.config import Plugin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Precision = Literal["bf16", "fp32"]


class Teacher(Plugin, ABC):
    """Turns a checkpoint into the frozen module whose logits the student imitates."""

    @abstractmethod
    def load(self, directory: Path, *, precision: Precision) -> "PreTrainedModel":
        """Load from ``directory``, frozen, in evaluation mode.

        ``precision`` is that of the training's matrix products. Called with token ids ``[B, L]``
        the module returns ``logits`` ``[B, L, V]`` that come from a linear head.

        Raises:
            ModelError: if the checkpoint is damaged.
        """
