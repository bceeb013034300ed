"""Width of the MLPs.

Source: Muralidharan et al. 2024, Minitron (arXiv:2407.14679).
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from trt_kd.pruning.base import Place, Site, WidthAxis

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trt_kd.architectures.base import Architecture


class FfnAxis(WidthAxis):
    """Keep the best intermediate channels of every MLP, chosen layer by layer."""

    kind: Literal["ffn"] = "ffn"
    constraint: ClassVar[str] = "ffn_hidden_size"
    shape_field: ClassVar[str] = "ffn"

    def places(self, model: "PreTrainedModel", architecture: "Architecture") -> list[Place]:
        """One per MLP: what each channel brings into the down projection."""
        from trt_kd.architectures.base import columns

        found = []
        for index, layer in enumerate(architecture.layers(model)):
            mlp = architecture.mlp(layer)
            if mlp is not None:
                slices = (*mlp.makers, columns(mlp.down, mlp.down.in_features))
                found.append(Place((Site(mlp.down, "input"),), slices, index, mlp.down))
        return found
