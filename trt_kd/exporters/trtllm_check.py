"""Compare a TensorRT-LLM checkpoint with its source, tensor by tensor, without running a model.

It reads through the witness (``trtllm_reader``) and takes its expectations from the source's own
files alone.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_kd.architectures import architecture_of
from trt_kd.architectures.shape import read_shape
from trt_kd.artifacts import Artifact
from trt_kd.checkpoints import TOKENIZER_FILES, portable_config, read_json
from trt_kd.errors import ModelError
from trt_kd.exporters.hf_unified_files import Tensors, open_tensors
from trt_kd.exporters.trtllm_format import WEIGHTS, Layout, stock_config
from trt_kd.exporters.trtllm_reader import (
    Projection,
    Ranks,
    open_ranks,
    plain_tensors,
    projections,
)
from trt_kd.quantization.storage import QUANTIZERS

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST_CODE = {"FP8": 448.0, "W8A8_SQ_PER_CHANNEL": 127.0}
_GAIN_LIMIT = 0.02
"""How far the slope of stored against true weights may be from one; rounding alone averages out."""
_INT4_MAX = 7.0
_STEP_LIMIT = 0.01
"""How far a block's scale may be from the largest of its weights over 7, rounded to 16 bits."""
_CODE_LIMIT = 0.55
"""Steps that a weight may be away from its INT4 code: half of one, and the source's rounding."""
_SCALE_LIMIT = 0.02
"""How far a scale may be from what calibration saw."""
_FUSED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def problems(
    source: Artifact,
    out: Path,
    promised: Mapping[str, Any],
    weight_error_limit: float | None,
) -> list[str]:
    """What speaks against ``out`` being ``source`` as ``promised``; empty if nothing does.

    ``promised`` holds dtype, quant_algo, kv_cache_quant_algo, group_size, tp_size, pp_size and
    intermediate_size: channels of the MLP beyond the source's must be zeros.
    Weights that are not quantized must be the source's in that dtype; the others within
    ``weight_error_limit``, in relative Frobenius norm, smoothing applied to both.
    """
    try:
        with ExitStack() as stack:
            ranks = stack.enter_context(open_ranks(out))
            weights = stack.enter_context(open_tensors(source.path, leave_out=QUANTIZERS))
            found = _promise_problems(ranks.layout, promised)
            found += _config_problems(ranks.layout, source.path)
            found += _companion_problems(source.path, out)
            if found:
                return found
            calibrated: Mapping[str, Tensor] = {}
            if ranks.layout.algorithm:
                calibrated = stack.enter_context(open_tensors(source.path, only=QUANTIZERS))
            found += _plain_problems(ranks, weights)
            for projection in projections(ranks):
                found += _projection_problems(
                    ranks.layout, projection, weights, calibrated, weight_error_limit
                )
            if ranks.layout.fp8_cache:
                found += _cache_problems(ranks, calibrated)
    except ModelError as error:
        return [str(error)]
    return found


def low_bit_share(directory: Path) -> float:
    """Share of a checkpoint's weights that are stored in its low-bit format, from headers alone."""
    low = every = 0
    with open_ranks(directory) as ranks:
        for kind, shape in ranks.weight_headers():
            every += prod(shape)
            low += prod(shape) * (kind in WEIGHTS.values())
    return low / every


def _promise_problems(layout: Layout, promised: Mapping[str, Any]) -> list[str]:
    found = {
        "dtype": layout["dtype"],
        "quant_algo": layout.algorithm,
        "kv_cache_quant_algo": layout["quantization"]["kv_cache_quant_algo"],
        "group_size": layout.block,
        "tp_size": layout.tp,
        "pp_size": layout.pp,
        "intermediate_size": layout["intermediate_size"],
    }
    return [
        f"config.json: {key} is {found[key]!r}, asked for was {value!r}"
        for key, value in promised.items()
        if found[key] != value
    ]


def _config_problems(layout: Layout, source: Path) -> list[str]:
    """Every setting of the stock model that the checkpoint stands for must be the source's."""
    actual, shape = stock_config(layout), read_shape(source)
    told = portable_config(read_json(source / "config.json"))
    longest = told["max_position_embeddings"]
    if shape.window_layers:
        longest = min(longest, shape.window)
    expected = told | {
        "model_type": "llama" if shape.model_type == "mistral" else shape.model_type,
        "max_position_embeddings": longest,
        "attention_bias": shape.attention_bias,
        "tie_word_embeddings": shape.tied,
        "sliding_window": longest,
    }
    found = [
        f"config.json stands for {key} {actual[key]!r}, source {expected.get(key)!r}"
        for key in sorted(actual)
        if key not in ("rope_parameters", "intermediate_size") and actual[key] != expected.get(key)
    ]
    rope, right = actual["rope_parameters"], expected["rope_parameters"]
    found += [
        f"config.json stands for {key} {rope.get(key)!r} of rope, source {right.get(key)!r}"
        for key in sorted(set(rope) | set(right))
        if rope.get(key) != right.get(key)
    ]
    return found


def _companion_problems(source: Path, out: Path) -> list[str]:
    names = [n for n in ("generation_config.json", *TOKENIZER_FILES) if (source / n).is_file()]
    return [
        f"{name} is not the source's"
        for name in names
        if not (out / name).is_file() or (out / name).read_bytes() != (source / name).read_bytes()
    ]


def _plain_problems(ranks: Ranks, weights: Tensors) -> list[str]:
    offset = architecture_of(ranks.layout.model_type).norm_offset
    found = []
    for name, actual in plain_tensors(ranks):
        origin = name
        if name == "lm_head.weight" and ranks.layout["share_embedding_table"]:
            origin = "model.embed_tokens.weight"
        shift = offset if "norm" in name else 0.0
        expected = _stored(ranks.layout, weights[origin].float() + shift) - shift
        if actual.shape != expected.shape or not bool((actual == expected).all()):
            found.append(f"{name} is not quantized, but differs from the source")
    return found


def _stored(layout: Layout, weight: "Tensor") -> "Tensor":
    """What is left of ``weight`` in the checkpoint's dtype, in float32."""
    import torch

    return weight.to(getattr(torch, layout["dtype"])).float()


def _projection_problems(
    layout: Layout,
    projection: Projection,
    weights: Tensors,
    calibrated: Mapping[str, "Tensor"],
    limit: float | None,
) -> list[str]:
    name = projection.name
    found = []
    if projection.bias is not None:
        expected = _stored(layout, weights[f"{name}.bias"])
        if not bool((projection.bias == expected).all()):
            found.append(f"{name}.bias differs from the source")
    expected = _grown(weights[f"{name}.weight"].float(), projection.weight.shape)
    if layout.algorithm is None:
        if not bool((projection.weight == _stored(layout, expected)).all()):
            found.append(f"{name}.weight is not quantized, but differs from the source")
        return found
    if projection.smoothing is not None:
        expected = expected / projection.smoothing
    if projection.step is not None:
        found += _code_problems(projection, expected, projection.step)
    elif limit is not None:
        found += _weight_problems(projection, expected, limit, by_row=layout.algorithm != "FP8")
    return found + _input_problems(layout, projection, calibrated)


def _grown(tensor: "Tensor", shape: tuple[int, ...]) -> "Tensor":
    """``tensor`` with zeros at its ends up to ``shape``: what added channels must be."""
    from torch.nn import functional as F

    more = [after - before for before, after in zip(tensor.shape, shape, strict=True)]
    return F.pad(tensor, [size for extra in reversed(more) for size in (0, extra)])


def _weight_problems(
    projection: Projection, expected: "Tensor", limit: float, *, by_row: bool
) -> list[str]:
    import torch

    found, actual = [], projection.weight
    error = float(torch.linalg.norm(actual - expected) / torch.linalg.norm(expected))
    if not error <= limit:
        found.append(f"{projection.name}.weight is {error:.1%} away, limit {limit:.0%}")
    rows = actual.shape[0] if by_row else 1
    true, stored = expected.reshape(rows, -1), actual.reshape(rows, -1)
    energy = true.square().sum(1)
    used = energy > 0
    slope = (true * stored).sum(1)[used] / energy[used]
    worst = float((slope - 1).abs().max())
    if not worst <= _GAIN_LIMIT:
        found.append(f"{projection.name}.weight is scaled wrongly by {worst:.1%}")
    return found


def _code_problems(projection: Projection, expected: "Tensor", step_OG: "Tensor") -> list[str]:
    """Every block's scale must come from its largest weight, every code be the nearest one."""
    shape = (*step_OG.shape, -1)
    blocks_OGB = expected.reshape(shape)
    largest_OG = blocks_OGB.abs().amax(2)
    used = largest_OG > 0
    away = float((step_OG[used] * _INT4_MAX / largest_OG[used] - 1).abs().max())
    if not away <= _STEP_LIMIT:
        return [f"{projection.name}: the scale of a block is {away:.1%} from that of its weights"]
    actual_OGB = projection.weight.reshape(shape)
    steps = float(((actual_OGB - blocks_OGB).abs() / step_OG[..., None]).max())
    if not steps <= _CODE_LIMIT:
        return [f"{projection.name}.weight is {steps:.2f} steps away, limit {_CODE_LIMIT}"]
    return []


def _input_problems(
    layout: Layout, projection: Projection, calibrated: Mapping[str, "Tensor"]
) -> list[str]:
    """A scale of the activation that is not what calibration saw, smoothed as the file says."""
    if layout.algorithm is None or projection.input_scale is None:
        return []
    prefix, _, part = projection.name.partition(".self_attn.")
    partners = [projection.name]
    if f"self_attn.{part}" in _FUSED:
        partners = [f"{prefix}.{partner}" for partner in _FUSED]
    seen = max(_seen_input(name, projection, calibrated) for name in partners)
    ratio = float(projection.input_scale) * _LARGEST_CODE[layout.algorithm] / seen
    if abs(ratio - 1) > _SCALE_LIMIT:
        return [f"{projection.name}: its input scale is {ratio:.3g} times what calibration saw"]
    return []


def _seen_input(name: str, projection: Projection, calibrated: Mapping[str, "Tensor"]) -> float:
    raw = f"{name}.input_quantizer._amax_for_smoothing"
    if projection.smoothing is not None and raw in calibrated:
        seen_I = _grown(calibrated[raw].float().reshape(-1), projection.smoothing.shape)
        return float((seen_I * projection.smoothing).max())
    return float(calibrated[f"{name}.input_quantizer._amax"].float().max())


def _cache_problems(ranks: Ranks, calibrated: Mapping[str, "Tensor"]) -> list[str]:
    found = []
    for layer, scale in enumerate(_cache_scales(ranks)):
        names = [f"model.layers.{layer}.self_attn.{p}_bmm_quantizer._amax" for p in "kv"]
        seen = max(float(calibrated[name].float().max()) for name in names) / 448.0
        if abs(scale / seen - 1) > _SCALE_LIMIT:
            found.append(
                f"layer {layer}: the scale of the key-value cache is {scale / seen:.3g} times "
                "what calibration saw"
            )
    return found


def _cache_scales(ranks: Ranks) -> Iterator[float]:
    layout = ranks.layout
    for layer in range(int(layout["num_hidden_layers"])):
        stage, local = divmod(layer, layout.stage_layers)
        name = f"transformer.layers.{local}.attention.kv_cache_scaling_factor"
        yield float(ranks.copies(stage, name))
