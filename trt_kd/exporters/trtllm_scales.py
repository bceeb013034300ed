"""Low-bit weights of a checkpoint of TensorRT-LLM from the ranges that calibration found.

TensorRT-LLM multiplies query, key and value as one matrix, so they share what belongs to a whole
matrix: the FP8 scale, the smoothing of the input and the scale of the activation.

Sources: Micikevicius et al. 2022 (arXiv:2209.05433) for FP8, Xiao et al. 2022, SmoothQuant
(arXiv:2211.10438) and Lin et al. 2023, AWQ (arXiv:2306.00978) for the smoothing. Shape suffixes: O
output and I input features, G blocks along the input.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trt_kd.errors import ModelError

_FP8_MAX, _INT8_MAX, _INT4_MAX = 448.0, 127.0, 7.0


@dataclass(frozen=True)
class Smoothed:
    """One projection as calibration left it: its weight holds the smoothing already."""

    name: str
    weight: Tensor
    """``[O, I]`` float32."""
    smoothing: Tensor | None
    """Factor ``[I]`` on the input, None without smoothing."""


@dataclass(frozen=True)
class Ranges(Smoothed):
    """One projection whose input is quantized too."""

    weight_amax: Tensor
    input_amax: Tensor
    raw_input_amax: Tensor | None
    """Largest input ``[I]`` of every channel before smoothing."""


def smoothed_of(name: str, weight_OI: Tensor, quantizers: Mapping[str, Tensor]) -> Smoothed:
    """Collect what ``quantizers`` hold of ``name``, of which the weight alone is quantized.

    Raises:
        ModelError: if it was not calibrated, or a range is not a finite number above zero.
    """
    _calibrated(name, ("weight_quantizer._amax",), quantizers)
    smoothing = _optional(quantizers, f"{name}.input_quantizer._pre_quant_scale")
    return Smoothed(name, weight_OI.float(), smoothing)


def ranges_of(name: str, weight_OI: Tensor, quantizers: Mapping[str, Tensor]) -> Ranges:
    """Collect what ``quantizers`` hold of the projection ``name``.

    Raises:
        ModelError: if it was not calibrated, or a range is not a finite number above zero.
    """
    found = _calibrated(name, ("weight_quantizer._amax", "input_quantizer._amax"), quantizers)
    return Ranges(
        name,
        weight_OI.float(),
        _optional(quantizers, f"{name}.input_quantizer._pre_quant_scale"),
        found["weight_quantizer._amax"],
        found["input_quantizer._amax"],
        _optional(quantizers, f"{name}.input_quantizer._amax_for_smoothing"),
    )


def _calibrated(
    name: str, wanted: Sequence[str], quantizers: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The ranges ``wanted`` of a projection, in float32."""
    found = {}
    for what in wanted:
        if f"{name}.{what}" not in quantizers:
            raise ModelError(
                f"{name} has no {what}: it was not quantized like the rest",
                hint="quantize the model again, all projections in one format",
            )
        found[what] = quantizers[f"{name}.{what}"].float()
        if not bool(found[what].isfinite().all()) or float(found[what].max()) <= 0:
            raise ModelError(
                f"{name}.{what} is zero or not finite",
                hint="its weights or activations vanish or overflow: evaluate the source first",
            )
    return found


def fp8_tensors(parts: Sequence[Ranges]) -> dict[str, Tensor]:
    """FP8 codes of ``parts``, one below the other, under the largest of their scales."""
    amax = torch.stack([part.weight_amax.max() for part in parts]).max()
    weight_OI = torch.cat([part.weight for part in parts])
    scale = amax / _FP8_MAX
    codes = (weight_OI / scale).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
    return {
        "weight": codes,
        "weights_scaling_factor": scale.reshape(1),
        "activation_scaling_factor": (_largest_input(parts) / _FP8_MAX).reshape(1),
    }


def int8_tensors(parts: Sequence[Ranges], dtype: torch.dtype) -> dict[str, Tensor]:
    """INT8 codes of ``parts``, one below the other, with one smoothing for all of them.

    The smoothing is stored in ``dtype``; weights are scaled to what is left of it there. Without
    smoothing it is one.

    Raises:
        ModelError: if parts are smoothed differently and the ranges before that are not known.
    """
    smoothing_I = _common_smoothing(parts).to(dtype).float()
    rows, row_amax, inputs = [], [], []
    for part in parts:
        own_I = part.smoothing if part.smoothing is not None else torch.ones_like(smoothing_I)
        if torch.equal(own_I, smoothing_I):
            rows.append(part.weight)
            row_amax.append(part.weight_amax.reshape(-1).expand(len(part.weight)))
            inputs.append(part.input_amax.max())
            continue
        weight_OI = part.weight * (own_I / smoothing_I)
        rows.append(weight_OI)
        row_amax.append(weight_OI.abs().amax(1))
        inputs.append(_smoothed_input(part, own_I, smoothing_I))
    scale_O = torch.cat(row_amax) / _INT8_MAX
    scale_O = torch.where(scale_O > 0, scale_O, torch.ones_like(scale_O))  # rows of zeros
    codes = (torch.cat(rows) / scale_O[:, None]).round().clamp(-_INT8_MAX - 1, _INT8_MAX)
    return {
        "weight": codes.to(torch.int8),
        "weights_scaling_factor": scale_O,
        "activation_scaling_factor": (torch.stack(inputs).max() / _INT8_MAX).reshape(1),
        "prequant_scaling_factor": smoothing_I.to(dtype),
    }


def int4_tensors(parts: Sequence[Smoothed], dtype: torch.dtype, block: int) -> dict[str, Tensor]:
    """INT4 codes of ``parts``, one below the other, with one smoothing for all of them.

    Engines round the scale of a block to ``dtype``, so the codes are made for what is left of it
    there. Two outputs share a byte: the low half is the even one, both in two's complement.
    """
    smoothing_I = _common_smoothing(parts).to(dtype).float()
    weight_OI = torch.cat(
        [
            part.weight
            if part.smoothing is None or torch.equal(part.smoothing, smoothing_I)
            else part.weight * (part.smoothing / smoothing_I)
            for part in parts
        ]
    )
    blocks_OGB = weight_OI.reshape(len(weight_OI), -1, block)
    scale_OG = (blocks_OGB.abs().amax(2) / _INT4_MAX).to(dtype).float()
    scale_OG = torch.where(scale_OG > 0, scale_OG, torch.ones_like(scale_OG))  # blocks of zeros
    codes_OGB = (blocks_OGB / scale_OG[..., None]).round().clamp(-_INT4_MAX - 1, _INT4_MAX)
    low, high = codes_OGB.to(torch.int8).reshape(len(weight_OI) // 2, 2, -1).unbind(1)
    return {
        "weight": (low & 15) | (high << 4),
        "weights_scaling_factor": scale_OG,
        "prequant_scaling_factor": smoothing_I.to(dtype),
    }


def _optional(quantizers: Mapping[str, Tensor], name: str) -> Tensor | None:
    return quantizers[name].float().reshape(-1) if name in quantizers else None


def _largest_input(parts: Sequence[Ranges]) -> Tensor:
    return torch.stack([part.input_amax.max() for part in parts]).max()


def _common_smoothing(parts: Sequence[Smoothed]) -> Tensor:
    given = [part.smoothing for part in parts if part.smoothing is not None]
    if not given:
        return torch.ones(parts[0].weight.shape[1])
    if len(given) < len(parts):
        raise ModelError(f"{parts[0].name} and its partners are smoothed only in part")
    return torch.stack(given).mean(0)


def _smoothed_input(part: Ranges, own_I: Tensor, smoothing_I: Tensor) -> Tensor:
    """Largest input after another smoothing; exact where the ranges before it are known."""
    if part.raw_input_amax is not None:
        return (part.raw_input_amax.reshape(-1) * smoothing_I).max()
    ratio = smoothing_I / own_I
    if float(ratio.max() / ratio.min()) > 1.02:  # more than what rounding to 16 bits moves
        raise ModelError(
            f"{part.name} is smoothed unlike its partners, and its input ranges are not known",
            hint="quantize the model again",
        )
    return part.input_amax.max() * ratio.max()
