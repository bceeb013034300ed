"""OLMo 2: norms behind attention and MLP only, and norms over all heads of queries and keys.

Source: OLMo et al. 2024 (arXiv:2501.00656).
"""

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from trt_kd.architectures.base import Attention, Slice
from trt_kd.architectures.llama import LlamaLike

if TYPE_CHECKING:
    from torch import nn


class Olmo2(LlamaLike):
    """Norms on what is added to the residual stream; q and k are normed over all their heads."""

    norm_names: ClassVar[tuple[str, ...]] = (
        "post_attention_layernorm",
        "post_feedforward_layernorm",
    )

    read_norms: ClassVar[tuple[str | None, str | None]] = (None, None)

    def attention(self, layer: "nn.Module") -> Attention:
        """See the base class."""
        found = super().attention(layer)
        q, k = (_over_heads(layer, name, found) for name in "qk")
        return replace(found, query=(*found.query, q), key_value=(*found.key_value, k))

    def adds_to_residual(self) -> bool:
        """No: a norm stands between."""
        return False


def _over_heads(layer: "nn.Module", name: str, found: Attention) -> Slice:
    norm = layer.get_submodule(f"self_attn.{name}_norm")
    units = found.heads if name == "q" else found.kv_heads
    channels = norm.get_parameter("weight").numel()
    return Slice(norm, "weight", 0, units, channels // units, rms=True)
