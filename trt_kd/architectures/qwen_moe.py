"""Qwen3 with experts, in every layer or in some of them.

Source: Yang et al. 2025, Qwen3 (arXiv:2505.09388).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from trt_kd.architectures.experts import experts_of
from trt_kd.architectures.llama import LlamaLike
from trt_kd.architectures.mixtral import MOE_MODULE_NAMES

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from trt_kd.architectures.base import Experts


class Qwen3Moe(LlamaLike):
    """Experts, or a dense MLP in the layers that the config names; norms on q and k."""

    config_names: ClassVar[Mapping[str, str]] = {
        **LlamaLike.config_names,
        "experts": "num_experts",
        "expert_ffn": "moe_intermediate_size",
    }
    module_names: ClassVar[Mapping[str, tuple[str, ...]]] = MOE_MODULE_NAMES
    expert_projections = ("gate_proj", "up_proj", "down_proj")

    def experts(self, layer: "nn.Module") -> "Experts | None":
        """See the base class."""
        block = layer.get_submodule("mlp")
        if not hasattr(block, "experts"):
            return None
        return experts_of(block, self.expert_projections)

    def keep_layers(self, model: "PreTrainedModel", kept: Sequence[int]) -> None:
        """See the base class; which layers are dense is written out."""
        super().keep_layers(model, kept)
        layers = enumerate(self.layers(model))
        model.config.mlp_only_layers = [n for n, layer in layers if self.experts(layer) is None]
        model.config.decoder_sparse_step = 1

    def portable(self, config: dict[str, Any]) -> dict[str, Any]:
        """The number of experts has another name in each version."""
        count = config.get("num_local_experts") or config.get("num_experts")
        return {**config, "num_local_experts": count, "num_experts": count}
