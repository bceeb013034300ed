"""Quantized projections of a written ONNX graph against what calibration kept.

A fault in one scale moves the logits less than their limit allows, so every code and scale is
read and compared, and the nodes from the input to the product are followed. It shares no
arithmetic with the writer. Shape suffixes: O output and I input features, G blocks of inputs.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trt_kd.exporters.hf_unified_files import open_tensors
from trt_kd.exporters.onnx_qdq import quantized_names
from trt_kd.exporters.onnx_writer import GRAPH
from trt_kd.optional import require
from trt_kd.quantization.storage import QUANTIZERS

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST = {"INT8": 127.0, "INT4": 7.0, "FLOAT8E4M3FN": 448.0}
_HALF_STEP = 0.5001  # of a code; what rounding the division adds is far below
_E4M3_RELATIVE, _E4M3_SMALLEST = 2.0**-4, 2.0**-9
"""Half a step of E4M3 relative to the number, and its smallest number."""


@dataclass(frozen=True)
class _Written:
    """The graph, by the names that lead through it."""

    directory: Path
    stored: Mapping[str, Any]
    made_by: Mapping[str, Any]
    read_by: Mapping[str, list[Any]]

    def array(self, name: str) -> "np.ndarray | None":
        """A stored tensor as float32; None if ``name`` is none."""
        onnx: Any = require("onnx", extra="onnx")
        if name not in self.stored:
            return None
        found = onnx.numpy_helper.to_array(self.stored[name], base_dir=str(self.directory))
        return np.asarray(found).astype(np.float32)

    def kind(self, name: str) -> str:
        """ONNX's name of the type of a stored tensor."""
        onnx: Any = require("onnx", extra="onnx")
        return str(onnx.TensorProto.DataType.Name(self.stored[name].data_type))


def qdq_problems(source: Path, out: Path, kind: str, block: int | None) -> list[str]:
    """Disagreements of the quantized projections in ``out`` with the artifact ``source``.

    ``kind`` is ONNX's name of the promised type, ``block`` the weights along the input that share
    a scale, None where a whole row or matrix does.
    """
    written = _written(out)
    found: list[str] = []
    with ExitStack() as stack:
        weights = stack.enter_context(open_tensors(source, leave_out=QUANTIZERS))
        kept = stack.enter_context(open_tensors(source, only=QUANTIZERS))
        names = set(quantized_names(kept))
        there = _low_bit_names(written)
        found += [f"{n} is low-bit in only one of source and graph" for n in sorted(there ^ names)]
        for name in sorted(there & names):
            place = f"{name}.weight"
            weight_OI = (kept[place] if place in kept else weights[place]).float().numpy()
            found += _projection_problems(written, name, kind, block, (weight_OI, kept))
    return [f"{GRAPH}: {problem}" for problem in found]


def _written(out: Path) -> _Written:
    onnx: Any = require("onnx", extra="onnx")
    graph = onnx.load(str(out / GRAPH), load_external_data=False).graph
    read_by: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            read_by.setdefault(name, []).append(node)
    made_by = {name: node for node in graph.node for name in node.output}
    return _Written(out, {t.name: t for t in graph.initializer}, made_by, read_by)


def _low_bit_names(written: _Written) -> set[str]:
    ending = ".weight.codes"
    return {name.removesuffix(ending) for name in written.stored if name.endswith(ending)}


def _projection_problems(
    written: _Written,
    name: str,
    kind: str,
    block: int | None,
    source: "tuple[np.ndarray, Mapping[str, Tensor]]",
) -> list[str]:
    """Follow one projection from its codes to its product, and from there back to its input."""
    weight_OI, kept = source
    codes = f"{name}.weight.codes"
    if written.kind(codes) != kind:
        return [f"{codes} is {written.kind(codes)}, promised was {kind}"]
    readers = written.read_by.get(codes, [])
    if [node.op_type for node in readers] != ["DequantizeLinear"]:
        return [f"{codes} is not read by one DequantizeLinear"]
    products = written.read_by.get(readers[0].output[0], [])
    if [node.op_type for node in products] != ["MatMul"]:
        return [f"{name}.weight is not read by one MatMul"]
    found = list(_weight_problems(written, readers[0], (name, kind, block), weight_OI, kept))
    return found + list(_input_problems(written, products[0].input[0], (name, kind), kept))


def _weight_problems(
    written: _Written,
    node: Any,
    what: tuple[str, str, int | None],
    weight_OI: np.ndarray,
    kept: "Mapping[str, Tensor]",
) -> Iterator[str]:
    """Scales are calibration's, and every code is the nearest to the weight."""
    name, kind, block = what
    outputs, inputs = weight_OI.shape
    amax = kept[f"{name}.weight_quantizer._amax"].float().numpy()
    asked: dict[str, int] = {}
    if block:
        asked, expected = {"axis": 0, "block_size": block}, amax.reshape(outputs, -1).T
    elif kind == "INT8":
        asked, expected = {"axis": 1}, amax.reshape(outputs)
    else:
        expected = amax.reshape(())
    expected = np.where(expected > 0, expected / _LARGEST[kind], np.float32(1))  # 1 for zeros alone
    scale = written.array(node.input[1])
    codes = written.array(node.input[0])
    attributes = {a.name: a.i for a in node.attribute}
    if attributes != asked or len(node.input) != 2:
        yield f"{name}.weight is dequantized by {attributes}, not by {asked} alone"
    elif scale is None or scale.shape != expected.shape:
        yield f"{name}.weight.scale is no stored tensor of shape {expected.shape}"
    elif not np.allclose(scale, expected, rtol=1e-5, atol=0):
        yield f"{name}.weight.scale is not what calibration found"
    elif codes is None or codes.shape != (inputs, outputs):
        yield f"{name}.weight.codes are no stored tensor of shape {(inputs, outputs)}"
    elif not _nearest(codes, scale, weight_OI.T, kind):
        yield f"{name}.weight.codes are not the nearest to the weight"


def _nearest(codes_IO: np.ndarray, scale: np.ndarray, weight_IO: np.ndarray, kind: str) -> bool:
    """Whether no other code is nearer to the weight, as far as the type reaches."""
    if scale.ndim == 2:
        scale = np.repeat(scale, len(codes_IO) // len(scale), axis=0)
    lowest = -_LARGEST[kind] - (0 if kind.startswith("FLOAT") else 1)
    right_IO = np.clip(weight_IO / scale, lowest, _LARGEST[kind])
    half = np.full_like(right_IO, _HALF_STEP)
    if kind.startswith("FLOAT"):
        half = 2 * _HALF_STEP * np.maximum(np.abs(right_IO) * _E4M3_RELATIVE, _E4M3_SMALLEST / 2)
    return bool((np.abs(codes_IO - right_IO) <= half).all())


def _input_problems(
    written: _Written, value: str, what: tuple[str, str], kept: "Mapping[str, Tensor]"
) -> Iterator[str]:
    """The product's input is smoothed and rounded as calibration says, and in that order."""
    name, kind = what
    if kind != "INT4":
        back = written.made_by.get(value)
        there = written.made_by.get(back.input[0]) if back is not None else None
        kinds = [getattr(node, "op_type", None) for node in (there, back)]
        if there is None or back is None or kinds != ["QuantizeLinear", "DequantizeLinear"]:
            yield f"the input of {name} is not quantized and dequantized"
            return
        value = there.input[0]
        scale, zero = written.array(back.input[1]), written.array(back.input[2])
        amax = float(kept[f"{name}.input_quantizer._amax"].float().max())
        if list(there.input[1:]) != list(back.input[1:]):
            yield f"the input of {name} is dequantized unlike it was quantized"
        elif scale is None or not np.allclose(scale, amax / _LARGEST[kind], rtol=1e-5, atol=0):
            yield f"{name}.input_scale is not what calibration found"
        elif zero is None or zero.any() or written.kind(back.input[2]) != kind:
            yield f"the zero point of the input of {name} is not the zero of {kind}"
    smoothing = f"{name}.input_quantizer._pre_quant_scale"
    if smoothing in kept:
        node = written.made_by.get(value)
        factor = None if node is None or node.op_type != "Mul" else written.array(node.input[1])
        right = kept[smoothing].float().numpy().reshape(-1)
        if factor is None or factor.shape != right.shape or not np.allclose(factor, right, 1e-6):
            yield f"{name}.smoothing is not what calibration found"
