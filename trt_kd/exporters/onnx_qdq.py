"""Quantized projections of an ONNX graph, as QuantizeLinear and DequantizeLinear.

A weight is stored as codes and dequantized where it is read; an input is smoothed, quantized and
dequantized before it. Runtimes of integer or FP8 products join these nodes with the product
between them. Numbers are those that calibration found, nothing is measured anew.

Sources: the operators' definitions in ONNX (operator sets 13, 19 and 21); Micikevicius et al. 2022
(arXiv:2209.05433) for FP8. Shape suffixes: O output and I input features, G blocks along the input.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trt_kd.exporters.onnx_writer import OPSET, OPSET_OF_INT4, Graph
from trt_kd.exporters.trtllm_scales import ranges_of, smoothed_of

LARGEST = {"INT8": 127.0, "INT4": 7.0, "FLOAT8E4M3FN": 448.0}
"""Code of the largest number, by type."""
WEIGHT_QUANTIZER = ".weight_quantizer._amax"
"""What the name of a projection's range of weights ends with."""


@dataclass(frozen=True)
class LowBit:
    """One projection: what its weight is stored as, and how its input is rounded."""

    name: str
    """The projection's, as in the checkpoint, without ``.weight``."""
    kind: str
    """ONNX's name of the low-bit type."""
    codes: Tensor
    """``[I, O]`` bytes, or ``[I, O / 2]`` where two codes share one."""
    scale: Tensor
    """``[]``, ``[O]`` or ``[G, O]`` float32."""
    smoothing: Tensor | None
    """Factor ``[I]`` on the input, float32."""
    input_scale: Tensor | None
    """``[]`` float32; None where inputs are not rounded."""

    def add_weight(self, graph: Graph) -> str:
        """Store the codes and return the name of the weight that they stand for, ``[I, O]``."""
        weight = f"{self.name}.weight"
        inputs = len(self.codes)
        outputs = self.codes.shape[1] * (2 if self.kind == "INT4" else 1)
        stored = graph.codes(f"{weight}.codes", self.codes, self.kind, (inputs, outputs))
        scale = graph.weight(f"{weight}.scale", self.scale)
        if self.scale.ndim == 2:
            block = inputs // len(self.scale)
            return graph.node("DequantizeLinear", stored, scale, axis=0, block_size=block)
        axis = {"axis": 1} if self.scale.ndim else {}
        return graph.node("DequantizeLinear", stored, scale, **axis)

    def add_input(self, graph: Graph, value: str) -> str:
        """Smooth and round ``value`` and return the name of the result."""
        if self.smoothing is not None:
            value = graph.node("Mul", value, graph.weight(f"{self.name}.smoothing", self.smoothing))
        if self.input_scale is None:
            return value
        scale = graph.weight(f"{self.name}.input_scale", self.input_scale)
        zero = graph.codes(f"zero_{self.kind}", torch.zeros(1, dtype=torch.uint8), self.kind, ())
        rounded = graph.node("QuantizeLinear", value, scale, zero)
        return graph.node("DequantizeLinear", rounded, scale, zero)

    def input_key(self) -> tuple[bytes | None, float | None]:
        """Equal for projections that round their inputs alike."""
        smoothing = None if self.smoothing is None else self.smoothing.numpy().tobytes()
        return smoothing, None if self.input_scale is None else self.input_scale.item()


def opset_of(low_bit: Mapping[str, LowBit]) -> int:
    """Operator set that these projections need."""
    return OPSET_OF_INT4 if "INT4" in {one.kind for one in low_bit.values()} else OPSET


def quantized_names(quantizers: Iterable[str]) -> Iterator[str]:
    """Projections whose weights are quantized, from the names that ``quantizers`` has."""
    for name in quantizers:
        if name.endswith(WEIGHT_QUANTIZER):
            yield name.removesuffix(WEIGHT_QUANTIZER)


def low_bit_of(
    name: str, weight_OI: Tensor, quantizers: Mapping[str, Tensor], kind: str, block: int | None
) -> LowBit:
    """Codes and scales of the projection ``name`` from what calibration kept in ``quantizers``.

    ``block`` are the weights that share a scale in INT4. The weight holds the smoothing already.

    Raises:
        ModelError: if it was not calibrated, or a range is not a finite number above zero.
    """
    outputs, inputs = weight_OI.shape
    if block is not None:
        part = smoothed_of(name, weight_OI, quantizers)
        amax_OG1 = quantizers[f"{name}{WEIGHT_QUANTIZER}"].float().reshape(outputs, -1, 1)
        codes = _codes(part.weight.reshape(outputs, -1, block), amax_OG1, kind)
        low, high = codes.reshape(outputs, inputs).T.reshape(inputs, -1, 2).unbind(2)
        packed = ((low & 15) | (high << 4)).view(torch.uint8)
        return LowBit(name, kind, packed, _scale(amax_OG1, kind)[..., 0].T, part.smoothing, None)
    ranges = ranges_of(name, weight_OI, quantizers)
    amax = ranges.weight_amax.reshape((outputs, 1) if kind == "INT8" else ())
    codes = _codes(ranges.weight, amax, kind).view(torch.uint8).T
    scale = _scale(amax, kind).reshape(-1) if kind == "INT8" else _scale(amax, kind)
    input_scale = _scale(ranges.input_amax.max(), kind)
    return LowBit(name, kind, codes, scale, ranges.smoothing, input_scale)


def _scale(amax: Tensor, kind: str) -> Tensor:
    """Number that a code of one stands for; one where there are zeros alone."""
    return torch.where(amax > 0, amax / LARGEST[kind], torch.ones_like(amax))


def _codes(weight: Tensor, amax: Tensor, kind: str) -> Tensor:
    """Round ``weight``; ties fall as in the simulated model, which multiplies by the reciprocal.

    Weights of 16 bits lie halfway between two codes often enough to matter.
    """
    largest = LARGEST[kind]
    factor = torch.tensor(largest) / amax  # a number over a tensor would round twice
    scaled = weight * torch.where(amax > 0, factor, torch.zeros_like(amax))
    if kind == "FLOAT8E4M3FN":
        return scaled.clamp(-largest, largest).to(torch.float8_e4m3fn)
    return scaled.round().clamp(-largest - 1, largest).to(torch.int8)
