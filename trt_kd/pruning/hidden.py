"""Width of the residual stream.

Source: Muralidharan et al. 2024, Minitron (arXiv:2407.14679); norms are rescaled, see
``slicing.py``.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from trt_kd.pruning.base import Place, Site, WidthAxis

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from trt_kd.architectures.base import Architecture


class HiddenAxis(WidthAxis):
    """Keep the best channels of the residual stream, the same ones everywhere; heads stay."""

    kind: Literal["hidden"] = "hidden"
    constraint: ClassVar[str] = "hidden_size"
    shape_field: ClassVar[str] = "hidden"

    def places(self, model: "PreTrainedModel", architecture: "Architecture") -> list[Place]:
        """One: the outputs of all norms in layers, and everything along the hidden size."""
        from trt_kd.architectures.base import Slice, norm_slices

        layers = architecture.layers(model)
        embedding, head = architecture.embedding(model), architecture.head(model)
        norms = [norm for layer in layers for norm in architecture.norms(layer)]
        hidden = embedding.embedding_dim
        slices = [Slice(embedding, "weight", 1, hidden), Slice(head, "weight", 1, hidden)]
        slices += [entry for layer in layers for entry in architecture.residual(layer)]
        slices += norm_slices(architecture.final_norm(model))
        return [Place(tuple(Site(norm, "output") for norm in norms), tuple(slices))]

    def after_cut(
        self,
        model: "PreTrainedModel",
        architecture: "Architecture",
        keep: "Sequence[Tensor]",
    ) -> None:
        """See the base class; the code may derive other things from the hidden size."""
        before = model.config.hidden_size
        super().after_cut(model, architecture, keep)
        architecture.after_hidden(model, before, model.config.hidden_size)
