"""Compare the files of a unified checkpoint with its source, tensor by tensor, without a model."""

from pathlib import Path
from typing import TYPE_CHECKING

from trt_kd.checkpoints import TOKENIZER_FILES, portable_config, read_json
from trt_kd.errors import ModelError
from trt_kd.exporters.hf_unified_files import (
    WEIGHT_TYPES,
    Layer,
    Quantization,
    Tensors,
    is_cache_scale,
    open_tensors,
    read_quantization,
)
from trt_kd.exporters.hf_unified_reader import weight_of
from trt_kd.quantization.float8 import Fp8
from trt_kd.quantization.int4 import Int4Awq
from trt_kd.quantization.int8 import Int8SmoothQuant
from trt_kd.quantization.storage import QUANTIZERS

if TYPE_CHECKING:
    from torch import Tensor

_SCALES = {"weight_scale", "input_scale", "pre_quant_scale"}
_LARGEST_CODE = {"FP8": 448.0, "W8A8_SQ_PER_CHANNEL": 127.0}
_SCALE_FACTOR = 2.0
_CACHE_TOLERANCE = 0.01
_LIMITS = {
    "FP8": Fp8.weight_error_limit,
    "W8A8_SQ_PER_CHANNEL": Int8SmoothQuant.weight_error_limit,
    "W4A16_AWQ": Int4Awq.weight_error_limit,
}
"""What a weight may be away from the source's, by its layer's algorithm."""


def problems(source: Path, out: Path, *, weight_error_limit: float | None) -> list[str]:
    """What speaks against ``out`` being ``source``; empty if nothing does.

    With a ``weight_error_limit`` every dequantized weight must be that close to the source's in
    relative Frobenius norm, smoothing applied to both, and every other tensor must be equal. Where
    each layer has a format of its own, its own limit holds, and every other matrix must be equal.
    """
    try:
        quantization = read_quantization(out)
        found = _config_problems(source, out)
        with open_tensors(source, leave_out=QUANTIZERS) as before, open_tensors(out) as after:
            found += _name_problems(before, after, quantization)
            for name in sorted(set(before) & set(after)):
                found += _tensor_problems(name, before, after, quantization, weight_error_limit)
        if quantization is not None:
            with (
                open_tensors(source, only=QUANTIZERS) as calibrated,
                open_tensors(out) as after,
            ):
                found += _input_scale_problems(calibrated, after, quantization)
                found += _cache_problems(calibrated, after, quantization)
    except ModelError as error:
        return [str(error)]
    return found


def _config_problems(source: Path, out: Path) -> list[str]:
    """Every setting but the quantization must be the source's; so must the tokenizer files."""
    expected = portable_config(read_json(source / "config.json"))
    actual = read_json(out / "config.json")
    expected.pop("quantization_config", None)
    actual.pop("quantization_config", None)
    found = [
        f"config.json: {key} is {actual.get(key)!r}, source {expected.get(key)!r}"
        for key in sorted(set(expected) | set(actual))
        if actual.get(key) != expected.get(key)
    ]
    for name in ("generation_config.json", *TOKENIZER_FILES):
        if name == "tokenizer_config.json" or not (source / name).is_file():
            continue  # its class may have been made portable
        if not (out / name).is_file() or (out / name).read_bytes() != (source / name).read_bytes():
            found.append(f"{name} is not the source's")
    return found


def _name_problems(before: Tensors, after: Tensors, quantization: Quantization | None) -> list[str]:
    """Tensors that are missing, or belong to nothing in the source."""
    found = [f"tensor {name} is missing" for name in sorted(set(before) - set(after))]
    told = quantization.layers if quantization is not None else None
    found += [
        f"{module} is said to be quantized, but has no scale"
        for module in sorted(told or ())
        if f"{module}.weight_scale" not in after
    ]
    for name in sorted(set(after) - set(before)):
        module, _, part = name.rpartition(".")
        if quantization is not None and quantization.kv_cache and is_cache_scale(name):
            continue
        if quantization is None or part not in _SCALES or f"{module}.weight" not in before:
            found.append(f"tensor {name} has no place in the source")
    return found


def _tensor_problems(
    name: str,
    before: Tensors,
    after: Tensors,
    quantization: Quantization | None,
    limit: float | None,
) -> list[str]:
    module = name.removesuffix(".weight")
    if quantization is not None and f"{module}.weight_scale" in after and name.endswith(".weight"):
        layer = quantization.of(module)
        if layer is None:
            return [f"{module} has a scale, but is said not to be quantized"]
        if quantization.layers is not None:
            limit = _LIMITS[layer.algorithm]
        found = _quantized_problems(module, before[name], after, layer.algorithm, limit)
        return found or _group_problems(module, before, after, layer)
    (old_type, old_shape), (new_type, new_shape) = before.header(name), after.header(name)
    if (old_type, old_shape) != (new_type, new_shape):
        return [f"{name} is {new_type} {list(new_shape)}, source {old_type} {list(old_shape)}"]
    mixed = quantization is not None and quantization.layers is not None and len(new_shape) > 1
    exact = quantization is None or limit is not None or mixed
    if exact and not bool((before[name] == after[name]).all()):
        return [f"{name} is not quantized, but differs from the source"]
    return []


def _quantized_problems(
    module: str, source_OI: "Tensor", after: Tensors, algorithm: str, limit: float | None
) -> list[str]:
    import torch

    stored = after.header(f"{module}.weight")[0]
    if stored != WEIGHT_TYPES[algorithm]:
        return [f"{module}.weight is stored as {stored}, not {WEIGHT_TYPES[algorithm]}"]
    for part in _SCALES & {name.rpartition(".")[2] for name in after if name.startswith(module)}:
        scale = after[f"{module}.{part}"]
        if not bool((scale.isfinite() & (scale > 0)).all()):
            return [f"{module}.{part} is not a positive number everywhere"]
    if limit is None:
        return []
    weight_OI, expected = weight_of(after, module, algorithm), source_OI.float()
    if weight_OI.shape != source_OI.shape:
        return [f"{module}.weight has shape {list(weight_OI.shape)}, not the source's"]
    if f"{module}.pre_quant_scale" in after:
        expected = expected / after[f"{module}.pre_quant_scale"].float()
    error = float(torch.linalg.norm(weight_OI - expected) / torch.linalg.norm(expected))
    if not error <= limit:
        return [f"{module}.weight is {error:.1%} away from the source, limit {limit:.0%}"]
    return []


def _group_problems(module: str, before: Tensors, after: Tensors, layer: Layer) -> list[str]:
    """Groups of another size than ``hf_quant_config.json`` tells the runtime."""
    scales = after.header(f"{module}.weight_scale")[1]
    if layer.algorithm != "W4A16_AWQ" or len(scales) < 2:
        return []
    size = before.header(f"{module}.weight")[1][1] // scales[1]
    if size == layer.group_size:
        return []
    return [f"{module} has groups of {size}, hf_quant_config.json says {layer.group_size}"]


def _input_scale_problems(
    calibrated: Tensors, after: Tensors, quantization: Quantization
) -> list[str]:
    """Static input scales that are not what calibration saw, fused partners allowed for."""
    found = []
    for name in calibrated:
        module, _, rest = name.partition(".input_quantizer.")
        layer = quantization.of(module)
        if rest != "_amax" or layer is None or layer.algorithm not in _LARGEST_CODE:
            continue
        if f"{module}.input_scale" not in after:
            found.append(f"tensor {module}.input_scale is missing")
            continue
        expected = float(calibrated[name]) / _LARGEST_CODE[layer.algorithm]
        ratio = float(after[f"{module}.input_scale"]) / expected
        if not 1 / _SCALE_FACTOR < ratio < _SCALE_FACTOR:
            found.append(f"{module}.input_scale is {ratio:.3g} times what calibration saw")
    return found


def _cache_problems(calibrated: Tensors, after: Tensors, quantization: Quantization) -> list[str]:
    """Scales of the key-value cache that are not what calibration saw; without one it is 1."""
    from trt_kd.exporters.arithmetic import E4M3_MAX

    expected = {}
    for name in calibrated:
        place, _, rest = name.rpartition("_bmm_quantizer.")
        parent, _, part = place.rpartition(".")
        if rest == "_amax" and part in ("k", "v"):
            expected[f"{parent}.{part}_proj.{part}_scale"] = float(calibrated[name]) / E4M3_MAX
    if expected and quantization.kv_cache is None:
        return ["keys and values were calibrated, but no format of the cache is told"]
    found = {name: float(after[name]) for name in after if is_cache_scale(name)}
    problems = [
        f"the cache's scale {name} has no range in the source"
        for name in sorted(set(found) - set(expected))
    ]
    for name, scale in expected.items():
        if name not in found:
            problems.append(f"tensor {name} is missing")
        elif not abs(found[name] / scale - 1) < _CACHE_TOLERANCE:
            problems.append(f"{name} is {found[name]:.3g}, calibration saw {scale:.3g}")
    return problems
