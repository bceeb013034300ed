"""Phi-3: one projection for queries, keys and values, one for gate and up.

Source: Abdin et al. 2024 (arXiv:2404.14219).
"""

from typing import TYPE_CHECKING, Any, ClassVar, cast

from trt_kd.architectures.base import Attention, Mlp, rows
from trt_kd.architectures.llama import LlamaLike

if TYPE_CHECKING:
    from torch import nn


class Phi3(LlamaLike):
    """Fused projections: queries, then keys, then values; gates, then what they multiply."""

    attention_readers: ClassVar[tuple[str, ...]] = ("self_attn.qkv_proj",)
    mlp_readers: ClassVar[tuple[str, ...]] = ("mlp.gate_up_proj",)

    def mlp(self, layer: "nn.Module") -> Mlp | None:
        """See the base class."""
        fused, down = layer.get_submodule("mlp.gate_up_proj"), layer.get_submodule("mlp.down_proj")
        ffn = cast("nn.Linear", down).in_features
        makers = (*rows(fused, ffn, width=1), *rows(fused, ffn, width=1, start=ffn))
        return Mlp(makers, cast("nn.Linear", down))

    def attention(self, layer: "nn.Module") -> Attention:
        """See the base class."""
        block = layer.get_submodule("self_attn")
        qkv, o = (cast("nn.Linear", block.get_submodule(f"{name}_proj")) for name in ("qkv", "o"))
        head_dim = cast("int", block.head_dim)
        heads = o.in_features // head_dim
        kv_heads = (qkv.out_features // head_dim - heads) // 2
        starts = (heads * head_dim, (heads + kv_heads) * head_dim)
        keys, values = (rows(qkv, kv_heads, width=head_dim, start=start) for start in starts)
        return Attention(
            query=rows(qkv, heads, width=head_dim),
            key_value=(*keys, *values),
            o=o,
            heads=heads,
            kv_heads=kv_heads,
        )

    def portable(self, config: dict[str, Any]) -> dict[str, Any]:
        """4.57 wants the share of rotary channels outside, and three entries of a long rope."""
        rope = config.get("rope_parameters") or {}
        share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
        result = {**config, "partial_rotary_factor": share}
        if rope.get("short_factor"):
            factors = {name: rope[name] for name in ("short_factor", "long_factor")}
            result["rope_scaling"] = {"type": "longrope", **factors}
        return result
