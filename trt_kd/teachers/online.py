"""The teacher runs beside the student and sees every batch."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trt_kd.checkpoints import load_model, stored_dtype
from trt_kd.teachers.base import Precision, Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class OnlineTeacher(Teacher):
    """Run the teacher's forward pass in every step."""

    kind: Literal["online"] = "online"
    """Name in the registry."""

    def load(self, directory: Path, *, precision: Precision) -> "PreTrainedModel":
        """See the base class.

        For bf16 training a float32 checkpoint keeps its norms and embeddings in float32 and has
        its linear layers cast once: what autocast would do again in every step. A 16-bit
        checkpoint is held in bfloat16 throughout.
        """
        import torch
        from torch import nn

        half = precision == "bf16" and stored_dtype(directory) in {"bfloat16", "float16"}
        model = load_model(directory, dtype="bfloat16" if half else "float32")
        model.requires_grad_(False)
        if precision == "bf16" and not half:
            embedding = model.get_input_embeddings().weight
            for module in model.modules():
                if isinstance(module, nn.Linear) and module.weight is not embedding:
                    module.to(torch.bfloat16)
        return model
