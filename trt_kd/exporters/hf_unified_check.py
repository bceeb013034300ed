"""Compare the files of a unified checkpoint with its source, tensor by tensor, without a model."""

from pathlib import Path
from typing import TYPE_CHECKING

from trt_kd.checkpoints import TOKENIZER_FILES, portable_config, read_json
from trt_kd.errors import ModelError
from trt_kd.exporters.hf_unified_files import (
    WEIGHT_TYPES,
    Quantization,
    Tensors,
    open_tensors,
    read_quantization,
)
from trt_kd.exporters.hf_unified_reader import weight_of
from trt_kd.quantization.storage import QUANTIZERS

if TYPE_CHECKING:
    from torch import Tensor

_SCALES = {"weight_scale", "input_scale", "pre_quant_scale"}
_LARGEST_CODE = {"FP8": 448.0, "W8A8_SQ_PER_CHANNEL": 127.0}
_SCALE_FACTOR = 2.0


def problems(source: Path, out: Path, *, weight_error_limit: float | None) -> list[str]:
    """What speaks against ``out`` being ``source``; empty if nothing does.

    With a ``weight_error_limit`` every dequantized weight must be that close to the source's in
    relative Frobenius norm, smoothing applied to both, and every other tensor must be equal.
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
                found += _input_scale_problems(calibrated, after, quantization.algorithm)
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
    for name in sorted(set(after) - set(before)):
        module, _, part = name.rpartition(".")
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
        found = _quantized_problems(module, before[name], after, quantization.algorithm, limit)
        return found or _group_problems(module, before, after, quantization)
    (old_type, old_shape), (new_type, new_shape) = before.header(name), after.header(name)
    if (old_type, old_shape) != (new_type, new_shape):
        return [f"{name} is {new_type} {list(new_shape)}, source {old_type} {list(old_shape)}"]
    exact = quantization is None or limit is not None
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


def _group_problems(
    module: str, before: Tensors, after: Tensors, quantization: Quantization
) -> list[str]:
    """Groups of another size than ``hf_quant_config.json`` tells the runtime."""
    scales = after.header(f"{module}.weight_scale")[1]
    if quantization.algorithm != "W4A16_AWQ" or len(scales) < 2:
        return []
    size = before.header(f"{module}.weight")[1][1] // scales[1]
    if size == quantization.group_size:
        return []
    return [f"{module} has groups of {size}, hf_quant_config.json says {quantization.group_size}"]


def _input_scale_problems(calibrated: Tensors, after: Tensors, algorithm: str) -> list[str]:
    """Static input scales that are not what calibration saw, fused partners allowed for."""
    if algorithm not in _LARGEST_CODE:
        return []
    found = []
    for name in calibrated:
        module, _, rest = name.partition(".input_quantizer.")
        if rest != "_amax":
            continue
        if f"{module}.input_scale" not in after:
            found.append(f"tensor {module}.input_scale is missing")
            continue
        expected = float(calibrated[name]) / _LARGEST_CODE[algorithm]
        ratio = float(after[f"{module}.input_scale"]) / expected
        if not 1 / _SCALE_FACTOR < ratio < _SCALE_FACTOR:
            found.append(f"{module}.input_scale is {ratio:.3g} times what calibration saw")
    return found
