"""The documented format of a TensorRT-LLM checkpoint, for those who read one.

The witness's half: what ``config.json`` may say, which tensors every rank's file must then hold,
and which stock model that is. It shares nothing with the writer. Source: the page "TensorRT-LLM
Checkpoint" of release 1.2.1 and ``PretrainedConfig``, ``LLaMAConfig``, ``QWenConfig``,
``GemmaConfig`` and ``QuantConfig`` there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_kd.checkpoints import portable_config, read_json
from trt_kd.errors import ModelError

MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
}
STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
WEIGHTS = {"FP8": "F8_E4M3", "W8A8_SQ_PER_CHANNEL": "I8", "W4A16_AWQ": "I8"}
"""Quantization algorithms that can be read, and how each stores a weight."""

_COMMON = {
    *("producer", "architecture", "dtype", "logits_dtype", "vocab_size", "hidden_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_size"),
    *("intermediate_size", "hidden_act", "norm_epsilon", "position_embedding_type"),
    *("max_position_embeddings", "rotary_embedding_dim", "rotary_base", "rotary_scaling"),
    *("attn_bias", "mlp_bias", "qk_layernorm", "use_parallel_embedding", "embedding_sharding_dim"),
    *("share_embedding_table", "mapping", "quantization"),
}
_EXTRA = {
    "qwen2": {"qwen_type", "seq_length", "use_logn_attn"},
    "qwen3": {"qwen_type", "seq_length", "use_logn_attn"},
    "gemma2": {
        *("inter_layernorms", "query_pre_attn_scalar"),
        *("final_logit_softcapping", "attn_logit_softcapping"),
    },
}
_MAPPING = {"world_size", "tp_size", "pp_size"}
_QUANTIZATION = {"quant_algo", "kv_cache_quant_algo"}
_QUANTIZED = _QUANTIZATION | {"exclude_modules"}
_IN_BLOCKS = _QUANTIZED | {"group_size", "has_zero_point", "pre_quant_scale"}
_BLOCKS = (64, 128)
_TILE = 64
"""Rows and columns of INT4 codes come in multiples of it: 32 bytes."""

Headers = dict[str, tuple[str, tuple[int, ...]]]
Rule = tuple[str, Any, bool, str]
"""A name, the value that it has, whether that is right, and what would be."""


@dataclass(frozen=True)
class Layout:
    """What ``config.json`` of a checkpoint says."""

    config: Mapping[str, Any]
    model_type: str

    def __getitem__(self, key: str) -> Any:
        """Value of a key of ``config.json``."""
        return self.config[key]

    @property
    def tp(self) -> int:
        """Tensor parallel ranks."""
        return int(self.config["mapping"]["tp_size"])

    @property
    def pp(self) -> int:
        """Pipeline parallel ranks."""
        return int(self.config["mapping"]["pp_size"])

    @property
    def algorithm(self) -> str | None:
        """Quantization algorithm of the projections."""
        value = self.config["quantization"]["quant_algo"]
        return None if value is None else str(value)

    @property
    def fp8_cache(self) -> bool:
        """Whether keys and values are cached in FP8."""
        return self.config["quantization"]["kv_cache_quant_algo"] is not None

    @property
    def block(self) -> int | None:
        """Weights along the input that share a scale, where they come in blocks."""
        return self.config["quantization"].get("group_size")  # type: ignore[no-any-return]

    @property
    def rank_heads(self) -> tuple[int, int]:
        """Query and key-value heads of one rank."""
        kv_heads = int(self["num_key_value_heads"])
        return int(self["num_attention_heads"]) // self.tp, max(1, kv_heads // self.tp)

    @property
    def rank_vocab(self) -> int:
        """Rows of a table of the vocabulary on one rank; tables are padded to equal shares."""
        return -(-int(self["vocab_size"]) // self.tp)

    @property
    def whole_embedding(self) -> bool:
        """Whether every rank holds the whole embedding."""
        return not self["use_parallel_embedding"]

    @property
    def stage_layers(self) -> int:
        """Layers of one pipeline stage."""
        return int(self["num_hidden_layers"]) // self.pp


def read_layout(directory: Path) -> Layout:
    """Read ``config.json`` of the checkpoint in ``directory``.

    TensorRT-LLM takes a default for a key that is absent and a key that it does not know without
    an error; here both are faults.

    Raises:
        ModelError: naming the first key that is missing, unknown or contradicts another.
    """
    config = read_json(directory / "config.json")
    model_type = MODEL_TYPES.get(str(config.get("architecture")))
    if model_type is None:
        raise ModelError(f"{directory}: architecture {config.get('architecture')!r} is not known")
    _same_keys(config, _COMMON | _EXTRA.get(model_type, set()), "config.json")
    _same_keys(config["mapping"], _MAPPING, "mapping")
    algorithm = config["quantization"].get("quant_algo")
    keys = {None: _QUANTIZATION, "W4A16_AWQ": _IN_BLOCKS}.get(algorithm, _QUANTIZED)
    _same_keys(config["quantization"], keys, "quantization")
    layout = Layout(config, model_type)
    for said, expected in _consistent(layout).items():
        raise ModelError(f"{directory}: config.json says {said}, {expected} is meant or known")
    return layout


def _same_keys(found: Mapping[str, Any], expected: set[str], where: str) -> None:
    if missing := sorted(expected - set(found)):
        raise ModelError(f"{where} lacks {missing[0]}: TensorRT-LLM would take its default")
    if unknown := sorted(set(found) - expected):
        raise ModelError(f"{where} has {unknown[0]}, which TensorRT-LLM does not read")


def _consistent(layout: Layout) -> dict[str, str]:
    """Contradictions: what is said, with what would be right."""
    kind, mapping = layout.model_type, layout["mapping"]
    heads, kv_heads = int(layout["num_attention_heads"]), int(layout["num_key_value_heads"])
    quantization = layout["quantization"]
    scaling = layout["rotary_scaling"] or {"type": 0, "rope_type": 0}
    tied = bool(layout["share_embedding_table"])
    rules: list[Rule] = [
        ("dtype", layout["dtype"], layout["dtype"] in STORED, ", ".join(STORED)),
        ("logits_dtype", layout["logits_dtype"], layout["logits_dtype"] == "float32", "float32"),
        ("mapping", mapping, mapping["world_size"] == layout.tp * layout.pp, "tp * pp ranks"),
        ("num_attention_heads", heads, heads % layout.tp == 0, "a multiple of tp_size"),
        (
            "num_key_value_heads",
            kv_heads,
            (kv_heads % layout.tp == 0 or layout.tp % kv_heads == 0) and heads % kv_heads == 0,
            "a divisor of the query heads that tp_size splits or copies",
        ),
        (
            "num_hidden_layers",
            layout["num_hidden_layers"],
            int(layout["num_hidden_layers"]) % layout.pp == 0,
            "a multiple of pp_size",
        ),
        (
            "position_embedding_type",
            layout["position_embedding_type"],
            layout["position_embedding_type"] == "rope_gpt_neox",
            "rope_gpt_neox",
        ),
        (
            "rotary_embedding_dim",
            layout["rotary_embedding_dim"],
            layout["rotary_embedding_dim"] == layout["head_size"],
            "head_size",
        ),
        ("rotary_scaling", scaling, scaling.get("type") == scaling.get("rope_type"), "one type"),
        ("mlp_bias", layout["mlp_bias"], layout["mlp_bias"] is False, "false"),
        (
            "qk_layernorm",
            layout["qk_layernorm"],
            layout["qk_layernorm"] is (kind == "qwen3"),
            "true for Qwen3 alone",
        ),
        (
            "embedding_sharding_dim",
            layout["embedding_sharding_dim"],
            layout["embedding_sharding_dim"] == 0,
            "0",
        ),
        (
            "use_parallel_embedding",
            layout["use_parallel_embedding"],
            layout["use_parallel_embedding"] is (layout.tp > 1),
            "true if and only if tp_size is above 1",
        ),
        ("share_embedding_table", tied, tied or kind != "gemma2", "true for Gemma"),
        (
            "quant_algo",
            layout.algorithm,
            layout.algorithm is None or layout.algorithm in WEIGHTS,
            ", ".join(WEIGHTS),
        ),
        (
            "kv_cache_quant_algo",
            quantization["kv_cache_quant_algo"],
            quantization["kv_cache_quant_algo"] in (None, "FP8"),
            "FP8 or none",
        ),
        (
            "exclude_modules",
            quantization.get("exclude_modules"),
            quantization.get("exclude_modules", ["lm_head"]) == ["lm_head"],
            "lm_head alone",
        ),
    ]
    if layout.algorithm == "W4A16_AWQ":
        rules += _block_rules(layout)
    if kind in ("qwen2", "qwen3"):
        rules += [
            ("qwen_type", layout["qwen_type"], layout["qwen_type"] == kind, kind),
            ("use_logn_attn", layout["use_logn_attn"], layout["use_logn_attn"] is False, "false"),
            ("seq_length", layout["seq_length"], layout["seq_length"] == 8192, "8192"),
        ]
    if kind == "gemma2":
        said = layout["inter_layernorms"]
        rules.append(("inter_layernorms", said, said is True, "true"))
    return {f"{name} {value}": right for name, value, holds, right in rules if not holds}


def _block_rules(layout: Layout) -> list[Rule]:
    """What holds of INT4 codes in blocks beside all the rest."""
    quantization, block = layout["quantization"], layout.block
    zero, smoothed = quantization["has_zero_point"], quantization["pre_quant_scale"]
    sixteen = layout["dtype"] in ("float16", "bfloat16")
    rules: list[Rule] = [
        ("group_size", block, block in _BLOCKS, "64 or 128"),
        ("has_zero_point", zero, zero is False, "false"),
        ("pre_quant_scale", smoothed, smoothed is True, "true"),
        ("dtype", layout["dtype"], sixteen, "float16 or bfloat16, beside INT4"),
    ]
    for name, (rows, columns) in _projection_shapes(layout).items():
        whole = rows % _TILE == 0 and bool(block in _BLOCKS and columns % block == 0)
        right = f"multiples of {_TILE} and of group_size"
        rules.append((f"a share of {name} of", [rows, columns], whole, right))
    return rules


def expected_headers(layout: Layout, rank: int) -> Headers:
    """Type and shape of every tensor that the file of ``rank`` must hold."""
    stage = rank // layout.tp
    kept = STORED[layout["dtype"]]
    hidden = int(layout["hidden_size"])
    table = (kept, (layout.rank_vocab, hidden))
    found: Headers = {}
    if stage == 0:
        found["transformer.vocab_embedding.weight"] = table
    for layer in range(layout.stage_layers):
        for name, header in _layer_headers(layout).items():
            found[f"transformer.layers.{layer}.{name}"] = header
    if stage == layout.pp - 1:
        found["transformer.ln_f.weight"] = (kept, (hidden,))
        if not layout["share_embedding_table"] or layout.pp > 1:
            found["lm_head.weight"] = table
    return found


def _layer_headers(layout: Layout) -> Headers:
    kept, hidden = STORED[layout["dtype"]], int(layout["hidden_size"])
    size, shapes = int(layout["head_size"]), _projection_shapes(layout)
    found: Headers = {}
    for name, shape in shapes.items():
        found |= _projection_headers(layout, name, shape)
    if layout["attn_bias"]:
        found["attention.qkv.bias"] = (kept, shapes["attention.qkv"][:1])
        if layout.model_type == "llama":
            found["attention.dense.bias"] = (kept, (hidden,))
    norms = ["input_layernorm", "post_layernorm"]
    if layout.model_type == "gemma2":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    found |= {f"{name}.weight": (kept, (hidden,)) for name in norms}
    if layout["qk_layernorm"]:
        found |= {f"attention.{part}_layernorm.weight": (kept, (size,)) for part in "qk"}
    if layout.fp8_cache:
        found["attention.kv_cache_scaling_factor"] = ("F32", (1,))
    return found


def _projection_shapes(layout: Layout) -> dict[str, tuple[int, int]]:
    """Output and input features of one rank's share of every projection of a layer."""
    hidden, size = int(layout["hidden_size"]), int(layout["head_size"])
    ffn, (heads, kv_heads) = int(layout["intermediate_size"]) // layout.tp, layout.rank_heads
    return {
        "attention.qkv": ((heads + 2 * kv_heads) * size, hidden),
        "attention.dense": (hidden, heads * size),
        "mlp.fc": (ffn, hidden),
        "mlp.gate": (ffn, hidden),
        "mlp.proj": (hidden, ffn),
    }


def _projection_headers(layout: Layout, name: str, shape: tuple[int, int]) -> Headers:
    kept, algorithm = STORED[layout["dtype"]], layout.algorithm
    if algorithm is None:
        return {f"{name}.weight": (kept, shape)}
    if layout.block is not None:
        rows, columns = shape
        return {
            f"{name}.weight": (WEIGHTS[algorithm], (rows // 2, columns)),
            f"{name}.weights_scaling_factor": ("F32", (rows, columns // layout.block)),
            f"{name}.prequant_scaling_factor": (kept, (columns,)),
        }
    found: Headers = {
        f"{name}.weight": (WEIGHTS[algorithm], shape),
        f"{name}.activation_scaling_factor": ("F32", (1,)),
        f"{name}.weights_scaling_factor": ("F32", (1,) if algorithm == "FP8" else shape[:1]),
    }
    if algorithm != "FP8":
        found[f"{name}.prequant_scaling_factor"] = (kept, shape[1:])
    return found


def stock_config(layout: Layout) -> dict[str, Any]:
    """The ``config.json`` of Hugging Face that describes the same model."""
    scaling = layout["rotary_scaling"]
    if scaling is not None:
        scaling = {key: value for key, value in scaling.items() if key != "type"}
    result = {
        "model_type": layout.model_type,
        "vocab_size": layout["vocab_size"],
        "hidden_size": layout["hidden_size"],
        "intermediate_size": layout["intermediate_size"],
        "num_hidden_layers": layout["num_hidden_layers"],
        "num_attention_heads": layout["num_attention_heads"],
        "num_key_value_heads": layout["num_key_value_heads"],
        "head_dim": layout["head_size"],
        "rms_norm_eps": layout["norm_epsilon"],
        "max_position_embeddings": layout["max_position_embeddings"],
        "rope_theta": layout["rotary_base"],
        "rope_scaling": scaling,
        "attention_bias": layout["attn_bias"],
        "tie_word_embeddings": layout["share_embedding_table"],
        "hidden_act": layout["hidden_act"],
    }
    if layout.model_type == "gemma2":
        names = ("query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping")
        result |= {name: layout[name] for name in names}
        result |= {
            "hidden_activation": result.pop("hidden_act"),
            "sliding_window": layout["max_position_embeddings"],
        }
    return portable_config(result)
