"""Gemma 2 and Gemma 3 (text): norms on both sides of attention and MLP, scaled embeddings.

Sources: Gemma Team 2024 (arXiv:2408.00118) and 2025 (arXiv:2503.19786).
"""

from typing import TYPE_CHECKING, Any, ClassVar

from trt_kd.architectures.llama import LlamaLike

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KINDS = ("full_attention", "sliding_attention")


class Gemma2(LlamaLike):
    """Norms multiply by 1 + weight; embeddings are multiplied by the root of the hidden size."""

    norm_offset: ClassVar[float] = 1.0
    whole_heads: ClassVar[bool] = True
    norm_names: ClassVar[tuple[str, ...]] = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )

    read_norms: ClassVar[tuple[str | None, str | None]] = (
        "input_layernorm",
        "pre_feedforward_layernorm",
    )

    def adds_to_residual(self) -> bool:
        """No: a norm stands between."""
        return False

    def after_hidden(self, model: "PreTrainedModel", before: int, after: int) -> None:
        """Scale the embeddings up where the code scales them less; a tied head must not notice."""
        import torch

        embedding, norm = self.embedding(model), self.final_norm(model).get_parameter("weight")
        growth = (before / after) ** 0.5
        with torch.no_grad():
            embedding.weight.copy_(embedding.weight.double() * growth)
            if self.head(model).weight is embedding.weight:
                norm.copy_((norm.double() + self.norm_offset) / growth - self.norm_offset)
            if hasattr(embedding, "embed_scale"):
                embedding.get_buffer("embed_scale").fill_(after**0.5)
                embedding.scalar_embed_scale = after**0.5


class Gemma3(Gemma2):
    """Gemma 3 (text): also norms on q and k, and another rotary base in layers with a window."""

    def portable(self, config: dict[str, Any]) -> dict[str, Any]:
        """Both bases in both spellings: by kind of layer in version 5, flat in 4.57."""
        rope = config.get("rope_parameters") or {}
        by_kind = {kind: rope[kind] for kind in _KINDS if isinstance(rope.get(kind), dict)}
        if len(by_kind) < len(_KINDS):
            base = config.get("rope_theta") or 1_000_000.0
            local = config.get("rope_local_base_freq") or 10_000.0
            scaling = {"rope_type": "default", **(config.get("rope_scaling") or {})}
            by_kind = {
                "full_attention": {**scaling, "rope_theta": base},
                "sliding_attention": {"rope_type": "default", "rope_theta": local},
            }
        full, sliding = (by_kind[kind] for kind in _KINDS)
        scaling = {name: value for name, value in full.items() if name != "rope_theta"}
        return {
            **config,
            "rope_parameters": by_kind,
            "rope_theta": full["rope_theta"],
            "rope_local_base_freq": sliding["rope_theta"],
            "rope_scaling": None if scaling.get("rope_type") == "default" else scaling,
        }
