"""The teacher runs beside the student and sees every batch."""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from trt_kd.checkpoints import load_model
from trt_kd.teachers.base import CHECKED_BLOCKS, Demand, Precision, Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class OnlineTeacher(Teacher):
    """Run the teacher's forward pass in every step."""

    shows_layers: ClassVar[bool] = True
    runs_beside: ClassVar[bool] = True

    kind: Literal["online"] = "online"
    """Name in the registry."""

    def targets(self, directory: Path, demand: Demand) -> "PreTrainedModel":
        """See the base class; the blocks are seen as training comes to them."""
        from trt_kd.teachers.forward import check_dropped_mass

        model = self.load(directory, precision=demand.precision)
        if demand.vocabulary is not None:
            first, limit = demand.blocks[:CHECKED_BLOCKS], self.max_dropped_mass
            check_dropped_mass(model, first, demand.vocabulary, demand.precision, limit=limit)
        return model

    def load(self, directory: Path, *, precision: Precision) -> "PreTrainedModel":
        """Load the checkpoint, frozen, in evaluation mode.

        For bf16 training linear layers are cast once, while norms and embeddings are float32:
        bit for bit what autocast over float32 weights would give, without its casts in every step.

        Raises:
            ModelError: if the checkpoint is damaged.
        """
        import torch
        from torch import nn

        model = load_model(directory, dtype="float32" if precision == "fp32" else None)
        model.requires_grad_(False)
        if precision == "bf16":
            embedding = model.get_input_embeddings().weight
            for module in model.modules():
                if not list(module.children()):
                    linear = isinstance(module, nn.Linear) and module.weight is not embedding
                    for parameter in module.parameters():
                        parameter.data = parameter.data.to(
                            torch.bfloat16 if linear else torch.float32
                        )
        return model
