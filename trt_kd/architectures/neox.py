"""GPT-NeoX (Pythia): LayerNorm, biases, attention and MLP beside each other, fused projections.

Source: Black et al. 2022 (arXiv:2204.06745).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

from trt_kd.architectures.base import Attention, rows
from trt_kd.architectures.llama import LlamaLike

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_DERIVED = "its code derives the size of a head from hidden size / heads"


class GptNeoX(LlamaLike):
    """Every head's queries, keys and values side by side in one projection, an MLP without gate."""

    lacks: ClassVar[Mapping[str, str]] = {
        "hidden": _DERIVED,
        "heads": _DERIVED,
        "kv_heads": "every head has keys and values of its own",
    }
    body_name: ClassVar[str] = "gpt_neox"
    attention_readers: ClassVar[tuple[str, ...]] = ("attention.query_key_value",)
    attention_writer: ClassVar[str] = "attention.dense"
    mlp_readers: ClassVar[tuple[str, ...]] = ("mlp.dense_h_to_4h",)
    mlp_writer: ClassVar[str] = "mlp.dense_4h_to_h"

    def stored(self, name: str) -> str:
        """See the base class; transformers 5 calls the head as other families do."""
        return name.replace("lm_head.", "embed_out.")

    def final_norm(self, model: "PreTrainedModel") -> "nn.Module":
        """See the base class."""
        return self.body(model).get_submodule("final_layer_norm")

    def attention(self, layer: "nn.Module") -> Attention:
        """See the base class; one unit is a head's queries, keys and values."""
        block = layer.get_submodule("attention")
        o = cast("nn.Linear", block.get_submodule("dense"))
        heads = o.in_features // cast("int", block.head_size)
        return Attention(
            query=rows(block.get_submodule("query_key_value"), heads),
            key_value=(),
            o=o,
            heads=heads,
            kv_heads=heads,
        )

    def portable(self, config: dict[str, Any]) -> dict[str, Any]:
        """4.57 has names of its own for the share of rotary channels and for the base."""
        rope = config.get("rope_parameters") or {}
        share = rope.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
        base = rope.get("rope_theta", config.get("rotary_emb_base", 10_000))
        return {**config, "rotary_pct": share, "rotary_emb_base": base}
