"""Compare the files of a unified checkpoint with its source, tensor by tensor, without a model."""

from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_kd.architectures import ARCHITECTURES, architecture_of
from trt_kd.checkpoints import TOKENIZER_FILES, portable_config, read_json
from trt_kd.errors import ModelError
from trt_kd.exporters.hf_unified_files import (
    Quantization,
    Tensors,
    is_cache_scale,
    open_tensors,
    read_quantization,
)
from trt_kd.exporters.hf_unified_weights import SCALES, Pair, smoothing_problems, tensor_problems
from trt_kd.quantization.storage import QUANTIZERS

if TYPE_CHECKING:
    from trt_kd.architectures.base import Architecture

_LARGEST_CODE = {"FP8": 448.0, "W8A8_SQ_PER_CHANNEL": 127.0, "W4A8_AWQ": 448.0}
_SCALE_FACTOR = 2.0
_CACHE_TOLERANCE = 0.01


def problems(source: Path, out: Path, *, weight_error_limit: float | None) -> list[str]:
    """What speaks against ``out`` being ``source``; empty if nothing does.

    With a ``weight_error_limit`` every dequantized weight must be that close to the source's in
    relative Frobenius norm, smoothing applied to both, and every other tensor must be equal, but
    for norms that took smoothing in. Where each layer has a format of its own, its own limit holds.
    """
    try:
        quantization = read_quantization(out)
        found = _config_problems(source, out)
        with open_tensors(source, leave_out=QUANTIZERS) as before, open_tensors(out) as after:
            found += _name_problems(before, after, quantization)
            pair = Pair(before, after, quantization, weight_error_limit, _norm_offset(out))
            for name in sorted(set(before) & set(after)):
                found += tensor_problems(name, pair)
            if quantization is not None:
                with open_tensors(source, only=QUANTIZERS) as calibrated:
                    inputs = calibrated_inputs(calibrated, after, read_json(out / "config.json"))
                    found += _input_scale_problems(inputs, after, quantization)
                    found += smoothing_problems(calibrated, pair)
                    found += _cache_problems(calibrated, after, quantization)
    except ModelError as error:
        return [str(error)]
    return found


def _norm_offset(out: Path) -> float:
    """What the norms of this family add to their weights."""
    kind = str(read_json(out / "config.json").get("model_type"))
    return architecture_of(kind).norm_offset if kind in ARCHITECTURES.names() else 0.0


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
        if quantization is None or part not in SCALES or f"{module}.weight" not in before:
            found.append(f"tensor {name} has no place in the source")
    return found


def calibrated_inputs(
    calibrated: Tensors, after: Tensors, config: Mapping[str, Any]
) -> dict[str, float]:
    """Largest absolute input that calibration saw, by projection as named in a checkpoint.

    Experts that transformers 5 keeps in two tensors share one range for each of them.
    """
    kind = str(config.get("model_type"))
    architecture = architecture_of(kind) if kind in ARCHITECTURES.names() else None
    found: dict[str, float] = {}
    for name in calibrated:
        place, _, rest = name.rpartition("input_quantizer.")
        if rest != "_amax":
            continue
        amax = float(calibrated[name])
        place = place[:-1] if architecture is None else architecture.stored(place[:-1])
        if place.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found |= dict.fromkeys(_projections(place, after, architecture), amax)
        else:
            found[place] = amax
    return found


def _projections(place: str, after: Tensors, architecture: "Architecture | None") -> Iterator[str]:
    """Projections of single experts that a tensor of all experts, ``place``, stands for."""
    names = architecture.expert_projections if architecture is not None else None
    if names is None:
        return
    block, _, part = place.rpartition(".")
    chosen = names[2:] if part == "down_proj" else names[:2]
    for expert in count():
        if f"{block}.{expert}.{chosen[0]}.weight" not in after:
            return
        yield from (f"{block}.{expert}.{name}" for name in chosen)


def _input_scale_problems(
    inputs: Mapping[str, float], after: Tensors, quantization: Quantization
) -> list[str]:
    """Static input scales that are not what calibration saw, fused partners allowed for."""
    found = []
    for module, amax in inputs.items():
        layer = quantization.of(module)
        if layer is None or layer.algorithm not in _LARGEST_CODE:
            continue
        if f"{module}.input_scale" not in after:
            found.append(f"tensor {module}.input_scale is missing")
            continue
        expected = amax / _LARGEST_CODE[layer.algorithm]
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
