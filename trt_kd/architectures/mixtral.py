"""Mixtral: a Llama with experts in every layer.

Source: Jiang et al. 2024 (arXiv:2401.04088).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from trt_kd.architectures.experts import experts_of
from trt_kd.architectures.llama import LlamaLike

if TYPE_CHECKING:
    from torch import nn

    from trt_kd.architectures.base import Experts

MOE_MODULE_NAMES: Mapping[str, tuple[str, ...]] = {
    **LlamaLike.module_names,
    "experts": ("num_experts",),
    "expert_ffn": ("intermediate_dim", "ffn_dim", "intermediate_size"),
}
"""Attributes of modules that repeat a size, those of experts included."""


class Mixtral(LlamaLike):
    """Experts in every layer; the weights of those chosen for a token sum to one."""

    config_names: ClassVar[Mapping[str, str]] = {
        **{name: key for name, key in LlamaLike.config_names.items() if name != "ffn"},
        "experts": "num_local_experts",
        "expert_ffn": "intermediate_size",
    }
    module_names: ClassVar[Mapping[str, tuple[str, ...]]] = MOE_MODULE_NAMES
    expert_projections = ("w1", "w3", "w2")

    def stored(self, name: str) -> str:
        """See the base class; transformers 5 calls the block ``mlp``."""
        return name.replace(".mlp.", ".block_sparse_moe.")

    def experts(self, layer: "nn.Module") -> "Experts | None":
        """See the base class."""
        name = "mlp" if hasattr(layer, "mlp") else "block_sparse_moe"
        return experts_of(layer.get_submodule(name), self.expert_projections)
