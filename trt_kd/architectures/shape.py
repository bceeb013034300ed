"""The sizes of a decoder, read from ``config.json`` alone: what plans and budgets are made of."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_kd.errors import ModelError


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama-like decoder; every count is per model unless it says per layer."""

    model_type: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    def parts(self) -> dict[str, int]:
        """Parameters by part of the model."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (query + 2 * key) + query * self.hidden
        attention += (query + 2 * key) * self.attention_bias + self.hidden * self.output_bias
        mlp = 3 * self.hidden * self.ffn + (2 * self.ffn + self.hidden) * self.mlp_bias
        norms = 2 * self.hidden + 2 * self.head_dim * self.qk_norm
        return {
            "embedding": self.vocab * self.hidden,
            "attention": self.layers * attention,
            "mlp": self.layers * mlp,
            "norms": self.layers * norms + self.hidden,
            "lm_head": 0 if self.tied else self.vocab * self.hidden,
        }

    @property
    def parameters(self) -> int:
        """Parameters of the whole model; a tied head counts once."""
        return sum(self.parts().values())

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        parts = self.parts()
        return (parts["attention"] + parts["mlp"] + parts["norms"] - self.hidden) // self.layers

    def kv_bytes_per_token(self, bytes_per_value: float = 2.0) -> float:
        """Bytes of key-value cache that one token of one sequence needs."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_value

    def forward_flops_per_token(self, context_tokens: int = 0) -> float:
        """Floating-point operations of one token's forward pass, head included."""
        head = self.vocab * self.hidden
        body = self.parameters - self.vocab * self.hidden * (1 if self.tied else 2)
        attention = 2 * self.layers * self.heads * self.head_dim * context_tokens
        return 2.0 * (body + head + attention)


_BIAS = {"qwen2": True}
_QK_NORM = {"qwen3": True}


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """Read the shape from the contents of a Hugging Face ``config.json``.

    Raises:
        ModelError: if a size is missing.
    """
    model_type = str(config.get("model_type"))
    try:
        heads = int(config["num_attention_heads"])
        hidden = int(config["hidden_size"])
        bias = bool(config.get("attention_bias", _BIAS.get(model_type, False)))
        return ModelShape(
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
            output_bias=bias and model_type != "qwen2",
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=_QK_NORM.get(model_type, False),
        )
    except KeyError as error:
        raise ModelError(
            f"config.json of a {model_type!r} model has no {error.args[0]!r}",
            hint="only decoder-only causal language models are supported",
        ) from error


def read_shape(directory: Path) -> ModelShape:
    """Read the shape of the checkpoint in ``directory``.

    Raises:
        ModelError: if its ``config.json`` is missing or damaged.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    return shape_from_config(config)
