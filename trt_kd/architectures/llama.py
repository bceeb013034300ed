"""Decoders built like Llama: Llama, Mistral, Qwen2 (biases on q, k, v), Qwen3 (norms on q, k)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from trt_kd.architectures.base import Architecture, Attention, Mlp

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# Per-layer lists that a config may hold: one entry for every layer.
_PER_LAYER = ("layer_types", "mlp_layer_types")


class LlamaLike(Architecture):
    """RMSNorm before attention and before a gated MLP, one residual stream, rotary positions."""

    def layers(self, model: "PreTrainedModel") -> "nn.ModuleList":
        """See the base class."""
        return cast("nn.ModuleList", model.get_submodule("model.layers"))

    def embedding(self, model: "PreTrainedModel") -> "nn.Embedding":
        """See the base class."""
        return cast("nn.Embedding", model.get_submodule("model.embed_tokens"))

    def final_norm(self, model: "PreTrainedModel") -> "nn.Module":
        """See the base class."""
        return model.get_submodule("model.norm")

    def head(self, model: "PreTrainedModel") -> "nn.Linear":
        """See the base class."""
        return cast("nn.Linear", model.get_submodule("lm_head"))

    def mlp(self, layer: "nn.Module") -> Mlp:
        """See the base class."""
        return Mlp(*_linears(layer, "mlp", ("gate_proj", "up_proj", "down_proj")))

    def attention(self, layer: "nn.Module") -> Attention:
        """See the base class."""
        return Attention(*_linears(layer, "self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")))

    def norms(self, layer: "nn.Module") -> "tuple[nn.Module, nn.Module]":
        """See the base class."""
        before_attention = layer.get_submodule("input_layernorm")
        return before_attention, layer.get_submodule("post_attention_layernorm")

    def record_ffn(self, model: "PreTrainedModel", size: int) -> None:
        """See the base class."""
        model.config.intermediate_size = size
        for layer in self.layers(model):
            _update(layer.get_submodule("mlp"), "intermediate_size", size)

    def record_hidden(self, model: "PreTrainedModel", size: int) -> None:
        """See the base class."""
        config = model.config
        if not getattr(config, "head_dim", None):
            config.head_dim = config.hidden_size // config.num_attention_heads
        config.hidden_size = size
        self.embedding(model).embedding_dim = size
        for layer in self.layers(model):
            for module in (layer, layer.get_submodule("mlp"), layer.get_submodule("self_attn")):
                _update(module, "hidden_size", size)

    def keep_layers(self, model: "PreTrainedModel", kept: Sequence[int]) -> None:
        """See the base class."""
        from torch import nn

        layers = self.layers(model)
        chosen = nn.ModuleList([layers[index] for index in kept])
        for index, layer in enumerate(chosen):
            _update(layer.get_submodule("self_attn"), "layer_idx", index)
        model.get_submodule("model").layers = chosen
        _keep_in_config(model.config, kept)


def _keep_in_config(config: Any, kept: Sequence[int]) -> None:
    for name in _PER_LAYER:
        entries = getattr(config, name, None)
        if isinstance(entries, list):
            setattr(config, name, [entries[index] for index in kept])
    # The layers before this number attend to everything, the ones after it to a window.
    full = getattr(config, "max_window_layers", None)
    if full is not None:
        config.max_window_layers = sum(index < full for index in kept)
    config.num_hidden_layers = len(kept)


def _linears(layer: "nn.Module", block: str, names: tuple[str, ...]) -> "list[nn.Linear]":
    return [cast("nn.Linear", layer.get_submodule(f"{block}.{name}")) for name in names]


def _update(module: "nn.Module", attribute: str, value: int) -> None:
    if hasattr(module, attribute):
        setattr(module, attribute, value)
