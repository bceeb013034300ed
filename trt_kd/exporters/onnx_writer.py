"""Collect the nodes and weights of an ONNX graph and write them, weights beside the graph.

A tensor goes to the data file as it is added: no second copy of the model is held in memory, and
the graph's own file stays far below the 2 GB that protobuf allows.
"""

from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import Self

from trt_kd.optional import require

if TYPE_CHECKING:
    from torch import Tensor

OPSET = 20
"""The first with Gelu as an operator; ONNX Runtime reads it since 1.17, TensorRT since 10."""
OPSET_OF_INT4 = 21
"""The first with INT4, and with a scale for every block of a matrix."""
IR_VERSION = 10
GRAPH, DATA = "model.onnx", "model.onnx.data"
Value = tuple[str, tuple[int | str, ...]]
"""Type, by its numpy name, and dimensions of an input or output."""
_INLINE_BYTES = 1024
_ALIGNMENT = 4096  # a page, so that a runtime can map the weights


class Graph:
    """A graph under construction in ``directory``. A context manager: leaving it closes files."""

    def __init__(self, directory: Path, opset: int = OPSET) -> None:
        self._onnx: Any = require("onnx", extra="onnx")
        self._directory = directory
        self._opset = opset
        self._data = (directory / DATA).open("wb")
        self._nodes: list[Any] = []
        self._weights: dict[str, Any] = {}
        self._constants: dict[tuple[Any, ...], str] = {}
        self._numbers = count()

    def __enter__(self) -> Self:
        """Return the graph itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the data file."""
        self._data.close()

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add a node of the standard domain and return the name of its output."""
        return self.nodes(operator, 1, *inputs, **attributes)[0]

    def nodes(self, operator: str, outputs: int, *inputs: str, **attributes: Any) -> list[str]:
        """Add a node with several outputs and return their names."""
        names = [f"{operator.lower()}_{next(self._numbers)}" for _ in range(outputs)]
        make: Any = self._onnx.helper.make_node
        self._nodes.append(make(operator, list(inputs), names, name=names[0], **attributes))
        return names

    def rename(self, value: str, name: str) -> None:
        """Give the value that leaves the graph its public name."""
        self._nodes.append(
            self._onnx.helper.make_node("Identity", [value], [name], name=f"output_{name}")
        )

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """Return the name of a small constant; equal ones are stored once."""
        array = np.asarray(value, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = name
            self._weights[name] = self._onnx.numpy_helper.from_array(array, name)
        return self._constants[key]

    def weight(self, name: str, tensor: "Tensor") -> str:
        """Store a tensor of the model under ``name``, once."""
        if name in self._weights:
            return name
        array = np.ascontiguousarray(tensor.detach().cpu().numpy()).reshape(tensor.shape)
        kind = self._onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        self._keep(name, array, self._onnx.TensorProto(dims=array.shape, data_type=kind))
        return name

    def codes(self, name: str, stored: "Tensor", kind: str, dims: Sequence[int]) -> str:
        """Store the bytes of ``stored`` as a tensor of the low-bit ``kind``, such as ``INT4``."""
        array = np.ascontiguousarray(stored.cpu().numpy())
        self._keep(name, array, self._onnx.TensorProto(dims=dims, data_type=self.type_of(kind)))
        return name

    def type_of(self, kind: str) -> int:
        """ONNX's number for a type by its own name."""
        return int(self._onnx.TensorProto.DataType.Value(kind))

    def _keep(self, name: str, array: np.ndarray, proto: Any) -> None:
        proto.name = name
        if array.nbytes < _INLINE_BYTES:
            proto.raw_data = array.tobytes()
        else:
            self._store(proto, array)
        self._weights[name] = proto

    def _store(self, proto: Any, array: np.ndarray) -> None:
        self._data.write(b"\0" * (-self._data.tell() % _ALIGNMENT))
        place = {"location": DATA, "offset": self._data.tell(), "length": array.nbytes}
        proto.data_location = self._onnx.TensorProto.EXTERNAL
        for key, value in place.items():
            proto.external_data.add(key=key, value=str(value))
        self._data.write(array.data if array.ndim else array.tobytes())

    def write(self, inputs: Mapping[str, Value], outputs: Mapping[str, Value]) -> int:
        """Write the graph's file and return its nodes; each computes what an output needs."""
        helper = self._onnx.helper
        nodes = _needed(self._nodes, set(outputs))
        read = {name for node in nodes for name in node.input}
        weights = [tensor for name, tensor in self._weights.items() if name in read]
        described = [[self._described(n, v) for n, v in side.items()] for side in (inputs, outputs)]
        graph = helper.make_graph(nodes, "decoder", *described, initializer=weights)
        opsets = [helper.make_opsetid("", self._opset)]
        model = helper.make_model(
            graph, producer_name="trt-kd", opset_imports=opsets, ir_version=IR_VERSION
        )
        self._onnx.save(model, str(self._directory / GRAPH))
        return len(nodes)

    def _described(self, name: str, value: Value) -> Any:
        helper, (dtype, dims) = self._onnx.helper, value
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return helper.make_tensor_value_info(name, kind, dims)


def _needed(nodes: Sequence[Any], wanted: set[str]) -> list[Any]:
    """Nodes that ``wanted`` values depend on, in their order."""
    kept = []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted = wanted | set(node.input)
            kept.append(node)
    return kept[::-1]
