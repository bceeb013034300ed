"""Weights of a unified checkpoint against its source's, one tensor at a time.

Shape suffixes: O output and I input features.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trt_kd.exporters.hf_unified_files import WEIGHT_TYPES, Layer, Quantization, Tensors
from trt_kd.exporters.hf_unified_reader import weight_of
from trt_kd.quantization.float8 import Fp8, Fp8Block, Fp8PerChannelPerToken
from trt_kd.quantization.int4 import Int4Awq, W4A8Awq
from trt_kd.quantization.int8 import Int8SmoothQuant

if TYPE_CHECKING:
    from torch import Tensor

SCALES = {"weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale"}
_LIMITS = {
    "FP8": Fp8.weight_error_limit,
    "FP8_PER_CHANNEL_PER_TOKEN": Fp8PerChannelPerToken.weight_error_limit,
    "fp8_pb_wo": Fp8Block.weight_error_limit,
    "W8A8_SQ_PER_CHANNEL": Int8SmoothQuant.weight_error_limit,
    "W4A16_AWQ": Int4Awq.weight_error_limit,
    "W4A8_AWQ": W4A8Awq.weight_error_limit,
}
"""What a weight may be away from the source's, by its layer's algorithm."""
_FOLDING = ("W4A16_AWQ", "W4A8_AWQ")
"""Algorithms whose smoothing goes into the norm before, where one feeds all that share it."""
_READ_BY_ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj")
_READ_BY_MLP = ("gate_proj", "up_proj", "gate_up_proj")


@dataclass(frozen=True)
class Pair:
    """A source and the checkpoint that was made of it."""

    before: Tensors
    after: Tensors
    quantization: Quantization | None
    limit: float | None
    """Largest relative error of a dequantized weight; None compares none."""
    norm_offset: float
    """What a norm adds to its weight before it multiplies."""


def tensor_problems(name: str, pair: Pair) -> list[str]:
    """What speaks against the tensor ``name`` of the checkpoint being the source's."""
    before, after, quantization = pair.before, pair.after, pair.quantization
    module = name.removesuffix(".weight")
    if quantization is not None and f"{module}.weight_scale" in after and name.endswith(".weight"):
        layer = quantization.of(module)
        if layer is None:
            return [f"{module} has a scale, but is said not to be quantized"]
        return _quantized_problems(module, pair, layer) or _group_problems(module, pair, layer)
    (old_type, old_shape), (new_type, new_shape) = before.header(name), after.header(name)
    if (old_type, old_shape) != (new_type, new_shape):
        return [f"{name} is {new_type} {list(new_shape)}, source {old_type} {list(old_shape)}"]
    if _must_be_equal(name, pair) and not bool((before[name] == after[name]).all()):
        return [f"{name} is not quantized, but differs from the source"]
    return []


def _must_be_equal(name: str, pair: Pair) -> bool:
    """Whether nothing may have changed an unquantized tensor; norms take smoothing in."""
    if pair.quantization is None:
        return True
    layers = pair.quantization.layers
    if layers is None and pair.limit is None:
        return False
    used = {layer.algorithm for layer in (layers or {}).values()} or {pair.quantization.algorithm}
    return not (used & set(_FOLDING) and name.endswith("norm.weight"))


def _quantized_problems(module: str, pair: Pair, layer: Layer) -> list[str]:
    after, algorithm = pair.after, layer.algorithm
    stored = after.header(f"{module}.weight")[0]
    if stored != WEIGHT_TYPES[algorithm]:
        return [f"{module}.weight is stored as {stored}, not {WEIGHT_TYPES[algorithm]}"]
    for part in sorted(SCALES):
        if (name := f"{module}.{part}") in after:
            scale = after[name]
            if not bool((scale.isfinite() & (scale > 0)).all()):
                return [f"{name} is not a positive number everywhere"]
    mixed = pair.quantization is not None and pair.quantization.layers is not None
    limit = _LIMITS[algorithm] if mixed else pair.limit
    return [] if limit is None else _error_problems(module, pair, algorithm, limit)


def _error_problems(module: str, pair: Pair, algorithm: str, limit: float) -> list[str]:
    """A dequantized weight that is too far from the source's, smoothing applied to both."""
    import torch

    weight_OI = weight_of(pair.after, module, algorithm)
    expected_OI = pair.before[f"{module}.weight"].float()
    if weight_OI.shape != expected_OI.shape:
        return [f"{module}.weight has shape {list(weight_OI.shape)}, not the source's"]
    factor = _smoothing(module, pair, algorithm)
    if factor.ndim and factor.shape != expected_OI.shape[1:]:
        return [f"{module}.pre_quant_scale has shape {list(factor.shape)}, not one per input"]
    expected_OI = expected_OI / factor
    error = float(torch.linalg.norm(weight_OI - expected_OI) / torch.linalg.norm(expected_OI))
    if not error <= limit:
        return [f"{module}.weight is {error:.1%} away from the source, limit {limit:.0%}"]
    return []


def _smoothing(module: str, pair: Pair, algorithm: str) -> "Tensor":
    """Factor ``[I]`` on the inputs of a projection that its weight makes up for, or one number.

    It stands beside the weight, or went into the norm that feeds the projection.
    """
    import torch

    factor = torch.ones(())
    if f"{module}.pre_quant_scale" in pair.after:
        factor = pair.after[f"{module}.pre_quant_scale"].float()
    norm = _norm_before(module, pair) if algorithm in _FOLDING else None
    if norm is not None:
        old, new = (
            tensors[norm].float() + pair.norm_offset for tensors in (pair.before, pair.after)
        )
        factor = factor * torch.where(old == 0, torch.ones_like(old), new / old)
    return factor


def smoothing_problems(calibrated: Tensors, pair: Pair) -> list[str]:
    """Projections whose inputs calibration scales, but the checkpoint does nowhere."""
    ending = ".input_quantizer._pre_quant_scale"
    found = []
    for name in calibrated:
        module = name.removesuffix(ending)
        layer = pair.quantization.of(module) if pair.quantization is not None else None
        if module == name or layer is None or f"{module}.pre_quant_scale" in pair.after:
            continue
        if layer.algorithm not in _FOLDING or _norm_before(module, pair) is None:
            found.append(f"tensor {module}.pre_quant_scale is missing")
    return found


def _norm_before(module: str, pair: Pair) -> str | None:
    """Name of the norm that feeds a projection, as the families with such norms call it."""
    parent, _, projection = module.rpartition(".")
    layer = parent.rpartition(".")[0]
    names = {
        **dict.fromkeys(_READ_BY_ATTENTION, ("input_layernorm",)),
        **dict.fromkeys(_READ_BY_MLP, ("pre_feedforward_layernorm", "post_attention_layernorm")),
    }.get(projection, ())
    found = (f"{layer}.{name}.weight" for name in names)
    return next((name for name in found if name in pair.before and name in pair.after), None)


def _group_problems(module: str, pair: Pair, layer: Layer) -> list[str]:
    """Groups of another size than ``hf_quant_config.json`` tells the runtime."""
    scales = pair.after.header(f"{module}.weight_scale")[1]
    if layer.algorithm not in _FOLDING or len(scales) < 2:
        return []
    size = pair.before.header(f"{module}.weight")[1][1] // scales[1]
    if size == layer.group_size:
        return []
    return [f"{module} has groups of {size}, hf_quant_config.json says {layer.group_size}"]
