"""What a TensorRT-LLM checkpoint says of a model and how ranks share it; needs no torch.

Source: TensorRT-LLM 1.2.1, ``models/modeling_utils.py`` and the ``config.py``, ``model.py`` and
``convert.py`` of the Llama, Qwen and Gemma families, with its page on the checkpoint format.
What those do not define is refused here and never guessed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

from trt_kd import __version__
from trt_kd.architectures.shape import ModelShape

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
}
"""Model types that can be written, with the class that reads them; Mistral is read as Llama."""

ALGORITHMS = {
    "fp8": "FP8",
    "int8": "W8A8_SQ_PER_CHANNEL",
    "int8_smoothquant": "W8A8_SQ_PER_CHANNEL",
    "int4_awq": "W4A16_AWQ",
}
"""Quantization formats that can be written, with TensorRT-LLM's name of each."""

LOW_BIT_MULTIPLE = 16
"""FP8 and INT8 matrix kernels want input widths that are multiples of it, on every rank."""
INT4_TILE = 64
"""Both dimensions of INT4 codes must be multiples of it on every rank: the kernels' layout wants 32
bytes either way."""
HEAD_MULTIPLE = 8
LARGEST_WORLD = 64
"""How far legal sizes are listed."""
_ROPE = ("default", "linear", "llama3")
_ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_WITH_ATTENTION_BIAS = ("llama", "qwen2")
_GEMMA2 = ("query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping")


@dataclass(frozen=True)
class Ranks:
    """Tensor times pipeline parallel ranks; rank number = pp rank * tp + tp rank."""

    tp: int
    pp: int

    @property
    def world(self) -> int:
        """Ranks, one file each."""
        return self.tp * self.pp

    def kv_heads(self, shape: ModelShape) -> int:
        """Key-value heads of one rank: where there are fewer than ranks each has a copy of one."""
        return max(1, shape.kv_heads // self.tp)

    def vocab(self, shape: ModelShape) -> int:
        """Rows of the embedding and of the head on one rank, the padding included."""
        return ceil(shape.vocab / self.tp)


def shape_problems(shape: ModelShape) -> list[str]:
    """Say why a model of ``shape`` has no checkpoint of TensorRT-LLM 1.2; empty if it has one."""
    kind = shape.model_type
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        return [
            f"{kind} models are not written as TensorRT-LLM checkpoints; those that are: {known}"
        ]
    found = []
    if shape.mlp_bias:
        found.append("TensorRT-LLM's converter of Llama drops the biases of the MLP (mlp_bias)")
    if shape.attention_bias and kind not in _WITH_ATTENTION_BIAS:
        found.append(f"TensorRT-LLM's {kind} models have no biases in attention (attention_bias)")
    if shape.head_dim % HEAD_MULTIPLE:
        found.append(
            f"heads of {shape.head_dim} channels: its attention kernels take multiples of "
            f"{HEAD_MULTIPLE}"
        )
    return found


def rank_problems(shape: ModelShape, ranks: Ranks, *, low_bit: bool) -> list[str]:
    """Say why a model of ``shape`` does not split over ``ranks``, with the sizes that it takes."""
    found = []
    split = partial(_split_reasons, shape, low_bit=low_bit)
    if reasons := split(ranks.tp):
        found.append(f"tensor_parallel {ranks.tp}: {'; '.join(reasons)}; legal: {_legal(split)}")
    if shape.layers % ranks.pp:
        legal = [str(pp) for pp in range(1, shape.layers + 1) if shape.layers % pp == 0]
        found.append(
            f"pipeline_parallel {ranks.pp}: {shape.layers} layers do not split evenly; "
            f"legal: {', '.join(legal)}"
        )
    return found


def _split_reasons(shape: ModelShape, tp: int, *, low_bit: bool) -> list[str]:
    reasons = []
    if shape.heads % tp:
        reasons.append(f"{shape.heads} query heads do not split evenly")
    if shape.kv_heads % tp and tp % shape.kv_heads:
        reasons.append(f"{shape.kv_heads} key-value heads neither split evenly nor copy evenly")
    width = shape.heads * shape.head_dim // tp
    if low_bit and not reasons and width % LOW_BIT_MULTIPLE:
        reasons.append(f"{width} attention channels a rank are no multiple of {LOW_BIT_MULTIPLE}")
    return reasons


def padded_ffn(shape: ModelShape, ranks: Ranks, *, low_bit: bool, block: int | None) -> int:
    """MLP channels of the checkpoint: with channels of zeros where ranks could not share them.

    Such a channel adds nothing. ``block`` are the inputs that share a scale in INT4.
    """
    step = ranks.tp * (max(INT4_TILE, block) if block else LOW_BIT_MULTIPLE)
    whole = shape.ffn % (step if low_bit else ranks.tp) == 0
    return shape.ffn if whole else ceil(shape.ffn / step) * step


def block_problems(shape: ModelShape, ranks: Ranks, block: int) -> list[str]:
    """Say why INT4 codes in blocks of ``block`` do not split over ``ranks``."""
    split = partial(_block_reasons, shape, block)
    if reasons := split(ranks.tp):
        what = f"tensor_parallel {ranks.tp} with blocks of {block}"
        return [f"{what}: {'; '.join(reasons)}; legal: {_legal(split)}"]
    return []


def _block_reasons(shape: ModelShape, block: int, tp: int) -> list[str]:
    if reasons := _split_reasons(shape, tp, low_bit=True):
        return reasons
    ranks = Ranks(tp, 1)
    query = shape.heads * shape.head_dim // tp
    widths = {"attention inputs": shape.hidden, "attention": query}
    rows = {
        "query, key and value": query + 2 * ranks.kv_heads(shape) * shape.head_dim,
        "hidden": shape.hidden,
    }
    return [
        f"{width} channels into the {name} projections of a rank are no multiple of {block}"
        for name, width in widths.items()
        if width % block
    ] + [
        f"{count} {name} rows of a rank are no multiple of {INT4_TILE}"
        for name, count in rows.items()
        if count % INT4_TILE
    ]


def _legal(split: Callable[[int], list[str]]) -> str:
    """Tensor parallel sizes that ``split`` has nothing against."""
    return ", ".join(str(tp) for tp in range(1, LARGEST_WORLD + 1) if not split(tp)) or "none"


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """Say what of a portable ``config.json`` TensorRT-LLM 1.2 cannot be told."""
    found = []
    rope = config.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    if "rope_theta" not in rope:
        found.append("config.json has no rope_theta")
    if kind not in _ROPE:
        found.append(f"rope of type {kind!r} is not written; those that are: {', '.join(_ROPE)}")
    if float(config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1) != 1:
        found.append("heads that rotate in part (partial_rotary_factor) are not written")
    gemma = config.get("model_type") == "gemma2"
    wanted = "gelu_pytorch_tanh" if gemma else "silu"
    if (activation := _activation(config)) != wanted:
        found.append(f"activation {activation!r}: TensorRT-LLM's converter knows {wanted!r} here")
    if gemma and not config.get("tie_word_embeddings", True):
        found.append("TensorRT-LLM ties the embeddings of every Gemma; this one's are not tied")
    return found


def checkpoint_config(
    config: Mapping[str, Any],
    shape: ModelShape,
    ranks: Ranks,
    *,
    dtype: str,
    quantization: Mapping[str, Any],
) -> dict[str, Any]:
    """``config.json`` of the checkpoint of a model with the portable Hugging Face ``config``.

    What TensorRT-LLM has a default for is written too: its defaults (rotary base 10000, head size
    hidden / heads) are those of other models, and it takes them without a word.
    """
    rope = config["rope_parameters"]
    architecture = ARCHITECTURES[shape.model_type]
    result = {
        "producer": {"name": "trt_kd", "version": __version__},
        "architecture": architecture,
        "dtype": dtype,
        "logits_dtype": "float32",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_size": shape.head_dim,
        "intermediate_size": shape.ffn,
        "hidden_act": _activation(config),
        "norm_epsilon": config["rms_norm_eps"],
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": positions(config, shape),
        "rotary_embedding_dim": shape.head_dim,
        "rotary_base": float(rope["rope_theta"]),
        "rotary_scaling": _scaling(rope),
        "attn_bias": shape.attention_bias,
        "mlp_bias": False,
        "qk_layernorm": shape.qk_norm == "head",
        "use_parallel_embedding": ranks.tp > 1,
        "embedding_sharding_dim": 0,
        "share_embedding_table": shape.tied,
        "mapping": {"world_size": ranks.world, "tp_size": ranks.tp, "pp_size": ranks.pp},
        "quantization": dict(quantization),
    }
    if shape.model_type in ("qwen2", "qwen3"):
        result |= {"qwen_type": shape.model_type, "seq_length": 8192, "use_logn_attn": False}
    if shape.model_type == "gemma2":
        result |= {"inter_layernorms": True, **{key: config.get(key) for key in _GEMMA2}}
    return result


def positions(config: Mapping[str, Any], shape: ModelShape) -> int:
    """Tokens of a sequence that the checkpoint may serve.

    A sliding window is a setting of the runtime, not of the checkpoint: where a model has one,
    sequences end with it, because up to there it changes nothing.
    """
    longest = int(config["max_position_embeddings"])
    return min(longest, shape.window) if shape.window_layers else longest


def _activation(config: Mapping[str, Any]) -> str:
    if config.get("model_type") == "gemma2":
        return str(config.get("hidden_activation"))
    return str(config.get("hidden_act"))


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    """Scaling of rope, its type under both names: versions differ in which one they read."""
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    return {
        "rope_type": kind,
        "type": kind,
        **{key: rope[key] for key in _ROPE_KEYS if key in rope},
    }
