"""A bfloat16 graph as one that computes in float32, for machines whose kernels lack bfloat16.

The weights keep their values; what the graph rounds between operators it no longer rounds.
"""

from pathlib import Path
from typing import Any

from trt_kd.optional import require

_EXTERNAL_FROM_BYTES = 1024


def has_bfloat16(graph: Path) -> bool:
    """Whether a weight of ``graph`` is stored in bfloat16; external data is not read."""
    onnx = require("onnx", extra="onnx")
    loaded = onnx.load(str(graph), load_external_data=False).graph
    return any(t.data_type == onnx.TensorProto.BFLOAT16 for t in loaded.initializer)


def widen(graph: Path, out: Path) -> None:
    """Write ``graph`` to the file ``out``, its weights beside it, with float32 for bfloat16."""
    onnx: Any = require("onnx", extra="onnx")
    model = onnx.load(str(graph))
    for tensor in model.graph.initializer:
        _widen_tensor(tensor)
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        if value.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == onnx.TensorProto.BFLOAT16:
                attribute.i = onnx.TensorProto.FLOAT
            elif attribute.HasField("t"):
                _widen_tensor(attribute.t)
    onnx.save_model(
        model,
        str(out),
        save_as_external_data=True,
        location=f"{out.name}.data",
        size_threshold=_EXTERNAL_FROM_BYTES,
    )


def _widen_tensor(tensor: Any) -> None:
    onnx: Any = require("onnx", extra="onnx")
    if tensor.data_type == onnx.TensorProto.BFLOAT16:
        values = onnx.numpy_helper.to_array(tensor).astype("float32")
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
