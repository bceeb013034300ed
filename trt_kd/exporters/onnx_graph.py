"""What an exported ONNX graph really holds, read from the graph and not from its options."""

from collections import Counter
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from trt_kd.optional import require

_BLOCK_QUANTIZED = ("MatMulNBits", "GatherBlockQuantized")
_WEIGHT_INPUT = {"MatMul": 1, "Gemm": 1, "Gather": 0}
_NORMS = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")


def weights_by_bits(path: Path) -> dict[int, int]:
    """Count of matrix and embedding weights by the bits each is stored in.

    A tensor that several nodes read, such as a tied head, counts once. External data is not read.
    """
    counts: Counter[int] = Counter()
    for bits, count in _matrices(_graph(path)).values():
        counts[bits] += count
    return dict(counts)


def opset(path: Path) -> int:
    """Version of the standard operators that the graph is written in."""
    onnx = require("onnx", extra="onnx")
    model = onnx.load(str(path), load_external_data=False)
    return next(int(entry.version) for entry in model.opset_import if not entry.domain)


def norm_epsilons(path: Path) -> set[float]:
    """Every epsilon of the graph's RMS norms, also of those written out in simple operators."""
    graph = _graph(path)
    nodes = (node for node in graph.node if node.op_type in _NORMS)
    found = {a.f for node in nodes for a in node.attribute if a.name == "epsilon"}
    return found | _written_out_epsilons(graph, path)


def _written_out_epsilons(graph: Any, path: Path) -> set[float]:
    """Constants that are added right before a square root."""
    onnx = require("onnx", extra="onnx")
    written = (node for node in graph.node if node.op_type == "Constant")
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {n.output[0]: a.t for n in written for a in n.attribute if a.name == "value"}
    made_by = {name: node for node in graph.node for name in node.output}
    sums = (made_by.get(node.input[0]) for node in graph.node if node.op_type == "Sqrt")
    names = [
        name
        for node in sums
        if node is not None and node.op_type == "Add"
        for name in node.input
        if name in constants
    ]
    return {
        float(onnx.numpy_helper.to_array(constants[name], base_dir=str(path.parent)).item())
        for name in names
    }


def rope_cosines(path: Path, positions: Sequence[int]) -> "np.ndarray | None":
    """Rows of the graph's cosine table, ``[positions, rotated width / 2]``.

    None if the graph rotates without such a table.
    """
    onnx = require("onnx", extra="onnx")
    for tensor in _graph(path).initializer:
        if tensor.name == "cos_cache":
            table = onnx.numpy_helper.to_array(tensor, base_dir=str(path.parent))
            return np.asarray(table[list(positions)], dtype=np.float64)
    return None


def _graph(path: Path) -> Any:
    onnx = require("onnx", extra="onnx")
    return onnx.load(str(path), load_external_data=False).graph


def _matrices(graph: Any) -> dict[str, tuple[int, int]]:
    """Bits and count of every weight tensor that a product or a look-up reads, by name."""
    onnx = require("onnx", extra="onnx")
    stored = {tensor.name: tensor for tensor in graph.initializer}
    origin = {out: node.input[0] for node in graph.node for out in node.output if node.input}
    found: dict[str, tuple[int, int]] = {}
    for node, name in _weights(graph):
        while name not in stored and name in origin:
            name = origin[name]  # through reshapes and casts of a shared table
        if name not in stored or len(stored[name].dims) < 2:
            continue
        tensor = stored[name]
        item = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        halves = tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
        bits, count = 4 if halves else 8 * item, prod(tensor.dims)
        attributes = {a.name: a.i for a in node.attribute}
        if node.op_type in _BLOCK_QUANTIZED:
            packed = bits // attributes["bits"]
            bits = attributes["bits"]
            count *= max(packed, 1)
            if "K" in attributes:
                count = attributes["K"] * attributes["N"]
        found.setdefault(name, (bits, count))
    return found


def _weights(graph: Any) -> Iterator[tuple[Any, str]]:
    for node in graph.node:
        if node.op_type in _BLOCK_QUANTIZED:
            yield node, node.input[1 if node.op_type == "MatMulNBits" else 0]
        elif node.op_type in _WEIGHT_INPUT:
            yield node, node.input[_WEIGHT_INPUT[node.op_type]]
