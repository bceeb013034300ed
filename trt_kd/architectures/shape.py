"""The sizes of a decoder, read from ``config.json`` alone: what plans and budgets are made of."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, cast

from trt_kd.errors import ModelError

QkNorm = Literal["none", "head", "full"]
"""No norm on queries and keys, one over a head's channels, or one over all heads' channels."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder; every count is per model unless it says per layer."""

    model_type: str
    layers: int
    hidden: int
    ffn: int
    """Channels of a dense MLP; 0 where every layer has experts instead."""
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: QkNorm = "none"
    gated: bool = True
    """Whether an MLP multiplies two projections (three matrices) or has one (two matrices)."""
    norms_per_layer: int = 2
    norm_bias: bool = False
    experts: int = 0
    """Experts of a mixture layer; 0 in a dense model."""
    experts_per_token: int = 0
    expert_ffn: int = 0
    dense_layers: int = 0
    """Layers with a dense MLP in a model of experts; the rest have experts."""
    window: int = 0
    """Tokens that a sliding-window layer attends to; 0 without such layers."""
    window_layers: int = 0
    derived_head_dim: bool = False
    """Whether the stock code insists that a head has hidden / heads channels."""

    @property
    def expert_layers(self) -> int:
        """Layers whose MLP is a mixture of experts."""
        return self.layers - self.dense_layers if self.experts else 0

    def with_sizes(self, **sizes: int) -> "ModelShape":
        """The same shape with other sizes."""
        return replace(self, **cast("dict[str, Any]", sizes))

    def with_layers(self, layers: Any) -> "ModelShape":
        """The same shape with so many layers; of layers that differ every kind keeps its share.

        Where all layers are alike ``layers`` may be an array.
        """
        kinds = {"window_layers": self.window_layers, "dense_layers": self.dense_layers}
        shares = {n: round(count * layers / self.layers) for n, count in kinds.items() if count}
        return replace(self, layers=layers, **shares)

    def changes(self, other: "ModelShape") -> dict[str, int]:
        """Sizes by name that differ from those of ``other``."""
        mine = vars(self).items()
        return {name: value for name, value in mine if value != getattr(other, name)}

    def parts(self) -> dict[str, int]:
        """Parameters by part of the model."""
        moe = self.expert_layers
        result = {
            "embedding": self.vocab * self.hidden,
            "attention": self.layers * self._attention(),
            "mlp": (self.layers - moe) * self._mlp(),
            "norms": self.layers * self._norms() + self.hidden * (1 + self.norm_bias),
            "lm_head": 0 if self.tied else self.vocab * self.hidden,
        }
        if moe:
            router = self.experts * self.hidden
            expert = 3 * self.hidden * self.expert_ffn
            result |= {"router": moe * router, "experts": moe * self.experts * expert}
        return result

    def _attention(self) -> int:
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        weights = self.hidden * (query + 2 * key) + query * self.hidden
        return weights + (query + 2 * key) * self.attention_bias + self.hidden * self.output_bias

    def _mlp(self) -> int:
        matrices = 3 if self.gated else 2
        biases = (matrices - 1) * self.ffn + self.hidden
        return matrices * self.hidden * self.ffn + biases * self.mlp_bias

    def _norms(self) -> int:
        query_key = {
            "none": 0,
            "head": 2 * self.head_dim,
            "full": (self.heads + self.kv_heads) * self.head_dim,
        }[self.qk_norm]
        return self.norms_per_layer * self.hidden * (1 + self.norm_bias) + query_key

    @property
    def parameters(self) -> int:
        """Parameters of the whole model; a tied head counts once."""
        return sum(self.parts().values())

    @property
    def active_parameters(self) -> int:
        """Parameters that one token passes through: of the experts only those chosen."""
        if not self.expert_layers:
            return self.parameters
        experts = self.parts()["experts"]
        return self.parameters - experts + experts * self.experts_per_token // self.experts

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer, the mean where layers differ."""
        outside = self.vocab * self.hidden * (1 if self.tied else 2)
        return (self.parameters - outside - self.hidden * (1 + self.norm_bias)) // self.layers

    def kv_bytes_per_token(self, bytes_per_value: float = 2.0) -> float:
        """Bytes of key-value cache that one token of one sequence needs."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_value

    def kv_cache_bytes(self, batch: int, tokens: int, bytes_per_value: float = 2.0) -> float:
        """Bytes of key-value cache of ``batch`` sequences; a window layer keeps its window."""
        held = (self.layers - self.window_layers) * tokens
        held += self.window_layers * min(tokens, self.window)
        return 2 * self.kv_heads * self.head_dim * bytes_per_value * batch * held

    def forward_flops_per_token(self, context_tokens: int = 0) -> float:
        """Floating-point operations of one token's forward pass, head included."""
        head = self.vocab * self.hidden
        body = self.active_parameters - self.vocab * self.hidden * (1 if self.tied else 2)
        attention = 2 * self.layers * self.heads * self.head_dim * context_tokens
        return 2.0 * (body + head + attention)


# What a family's config class fills in where ``config.json`` says nothing.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma2": {"tie_word_embeddings": True, "head_dim": 256, "sliding_window": 4096},
    "gemma3_text": {"tie_word_embeddings": True, "head_dim": 256, "sliding_window": 4096},
    "gpt_neox": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 4096},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2": {"attention_bias": True, "max_window_layers": 28},
    "qwen3": {"head_dim": 128, "max_window_layers": 28},
    "qwen3_moe": {"num_experts_per_tok": 8, "moe_intermediate_size": 768},
    "smollm3": {"tie_word_embeddings": True, "no_rope_layer_interval": 4},
}
_QK_NORM: dict[str, QkNorm] = {
    "qwen3": "head", "qwen3_moe": "head", "gemma3_text": "head", "olmo2": "full"
}  # fmt: skip
_WITHOUT_OUTPUT_BIAS = {"qwen2"}
_FOUR_NORMS = {"gemma2", "gemma3_text"}
_LAYER_NORM = {"gpt_neox"}
_SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "num_experts_per_tok", "num_experts",
    "num_local_experts", "moe_intermediate_size",
)  # fmt: skip
# The window holds for every layer, or for every layer if a switch is on.
_WINDOW_EVERYWHERE = {"mistral", "mixtral", "phi3"}
_WINDOW_SWITCH = {"qwen2", "qwen3", "qwen3_moe", "smollm3"}
# One layer in so many has no window where the config does not list the layers.
_WINDOW_PATTERN = {"gemma2": 2, "gemma3_text": 6}


def model_type_of(config: object) -> str:
    """The family that the contents of a ``config.json`` name.

    Raises:
        ModelError: if they name none.
    """
    if not isinstance(config, Mapping) or "model_type" not in config:
        raise ModelError(
            "config.json has no model_type",
            hint="give the folder of a Hugging Face causal language model",
        )
    return str(config["model_type"])


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """Read the shape from the contents of a Hugging Face ``config.json``.

    Raises:
        ModelError: if a size is missing or is none.
    """
    model_type = model_type_of(config)
    merged = {**_DEFAULTS.get(model_type, {}), **config}
    config = {name: value for name, value in merged.items() if value is not None}
    _check_sizes(model_type, config)
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        bias = bool(config.get("attention_bias", False))
        window_layers = _window_layers(model_type, config)
        shape = ModelShape(
            model_type=model_type,
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            ffn=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocab=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bias,
            output_bias=bias and model_type not in _WITHOUT_OUTPUT_BIAS,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=_QK_NORM.get(model_type, "none"),
            gated=model_type not in _LAYER_NORM,
            norms_per_layer=4 if model_type in _FOUR_NORMS else 2,
            norm_bias=model_type in _LAYER_NORM,
            window=int(config["sliding_window"]) if window_layers else 0,
            window_layers=window_layers,
            derived_head_dim=model_type == "gpt_neox" or _has_long_rope(model_type, config),
        )
        return _with_experts(shape, config)
    except KeyError as error:
        raise ModelError(
            f"config.json of a {model_type!r} model has no {error.args[0]!r}",
            hint="only decoder-only causal language models are supported",
        ) from error


def _check_sizes(model_type: str, config: Mapping[str, Any]) -> None:
    for name in _SIZES:
        value = config.get(name, 1)
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ModelError(
                f"config.json of a {model_type!r} model says {name} {value!r}",
                hint="a size is a whole number above 0: download or write config.json again",
            )


def _window_layers(model_type: str, config: Mapping[str, Any]) -> int:
    """Layers with a sliding window."""
    layers = int(config["num_hidden_layers"])
    switched_off = model_type in _WINDOW_SWITCH and not config.get("use_sliding_window")
    if not config.get("sliding_window") or switched_off:
        return 0
    if model_type in _WINDOW_EVERYWHERE or model_type == "qwen3_moe":
        return layers
    if isinstance(config.get("layer_types"), list):
        return list(config["layer_types"]).count("sliding_attention")
    if model_type in _WINDOW_PATTERN:
        pattern = config.get("sliding_window_pattern") or _WINDOW_PATTERN[model_type]
        return layers - layers // int(pattern)
    if model_type == "smollm3":
        interval = int(config["no_rope_layer_interval"])
        rope = config.get("no_rope_layers") or [(n + 1) % interval for n in range(layers)]
        return sum(not entry for entry in rope[:layers])
    return max(0, layers - int(config.get("max_window_layers", layers)))


def _has_long_rope(model_type: str, config: Mapping[str, Any]) -> bool:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return model_type == "phi3" and bool(rope.get("short_factor"))


def _with_experts(shape: ModelShape, config: Mapping[str, Any]) -> ModelShape:
    """The shape with its experts, in the two spellings of their number."""
    if shape.model_type == "mixtral":
        dense, width, ffn = 0, shape.ffn, 0
    elif shape.model_type == "qwen3_moe":
        only, step = config.get("mlp_only_layers") or [], int(config.get("decoder_sparse_step", 1))
        dense = sum(n in only or (n + 1) % step != 0 for n in range(shape.layers))
        width, ffn = int(config["moe_intermediate_size"]), shape.ffn if dense else 0
    else:
        return shape
    count = config.get("num_local_experts") or config.get("num_experts") or 128
    return replace(
        shape,
        ffn=ffn,
        experts=int(count),
        experts_per_token=int(config["num_experts_per_tok"]),
        expert_ffn=width,
        dense_layers=dense,
    )


def read_shape(directory: Path) -> ModelShape:
    """Read the shape of the checkpoint in ``directory``.

    Raises:
        ModelError: if its ``config.json`` is missing or damaged.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read: {error.strerror}", hint="give the folder of a model"
        ) from error
    except ValueError as error:
        raise ModelError(
            f"{path} is not valid JSON: {error}", hint="download or write it again"
        ) from error
    return shape_from_config(config)
