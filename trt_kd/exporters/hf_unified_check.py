"""Compare the files of a unified checkpoint with its source, tensor by tensor, without a model."""

from pathlib import Path
from typing import TYPE_CHECKING

from trt_kd.checkpoints import TOKENIZER_FILES, portable_config
from trt_kd.errors import ModelError
from trt_kd.exporters.hf_unified_files import (
    WEIGHT_TYPES,
    Quantization,
    Tensors,
    open_tensors,
    read_json,
    read_quantization,
)
from trt_kd.exporters.hf_unified_reader import weight_of
from trt_kd.quantization.storage import QUANTIZERS

if TYPE_CHECKING:
    from torch import Tensor

_SCALES = {"weight_scale", "input_scale", "pre_quant_scale"}


def problems(source: Path, out: Path, *, weight_error_limit: float | None) -> list[str]:
    """What speaks against ``out`` being ``source``; empty if nothing does.

    With a ``weight_error_limit`` every dequantized weight must be that close to the source's in
    relative Frobenius norm, and every tensor that is not quantized must be equal.
    """
    try:
        quantization = read_quantization(out)
        found = _config_problems(source, out)
        with open_tensors(source, leave_out=QUANTIZERS) as before, open_tensors(out) as after:
            found += _name_problems(before, after, quantization)
            for name in sorted(set(before) & set(after)):
                found += _tensor_problems(name, before, after, quantization, weight_error_limit)
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
        return _quantized_problems(module, before[name], after, quantization.algorithm, limit)
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
    weight_OI = weight_of(after, module, algorithm)
    if f"{module}.pre_quant_scale" in after:
        weight_OI = weight_OI * after[f"{module}.pre_quant_scale"].float()
    if weight_OI.shape != source_OI.shape:
        return [f"{module}.weight has shape {list(weight_OI.shape)}, not the source's"]
    expected = source_OI.float()
    error = float(torch.linalg.norm(weight_OI - expected) / torch.linalg.norm(expected))
    if not error <= limit:
        return [f"{module}.weight is {error:.1%} away from the source, limit {limit:.0%}"]
    return []
