"""What an exported ONNX step says about itself, from its graph and the source's file headers.

Logits are compared elsewhere; here stand the faults that a short text does not show: a window
longer than the text, a name that a runtime would not find, weights outside the directory.
"""

from collections.abc import Iterator
from math import isclose
from pathlib import Path
from typing import Any

import numpy as np

from trt_kd.architectures.shape import ModelShape, read_shape
from trt_kd.checkpoints import portable_config, read_json
from trt_kd.exporters.hf_unified_files import open_tensors
from trt_kd.exporters.onnx_qdq import quantized_names
from trt_kd.exporters.onnx_step import interface
from trt_kd.exporters.onnx_writer import DATA, GRAPH, OPSET, OPSET_OF_INT4
from trt_kd.optional import require
from trt_kd.quantization.storage import QUANTIZERS

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
"""Names of the table that a tied model reads twice; the capture keeps one of them."""


def problems(source: Path, out: Path, precision: str, low_bit: str | None = None) -> list[str]:
    """Disagreements of the files in ``out`` with the checkpoint ``source``.

    ``low_bit`` is ONNX's name of the type of quantized projections, None without any.
    """
    if missing := [name for name in (GRAPH, DATA, "config.json") if not (out / name).is_file()]:
        return [f"{missing[0]} is missing"]
    onnx: Any = require("onnx", extra="onnx")
    config = portable_config(read_json(source / "config.json"))
    written = read_json(out / "config.json")
    found = [
        f"config.json: {name} is {written.get(name)!r}, source {config.get(name)!r}"
        for name in sorted({*config, *written})
        if config.get(name) != written.get(name)
    ]
    try:
        model = onnx.load(str(out / GRAPH), load_external_data=False)
        found += _place_problems(model.graph, (out / DATA).stat().st_size)
        if found:  # the checker reads what the places point at
            return found
        onnx.checker.check_model(str(out / GRAPH), full_check=True)
    except _refusals(onnx) as error:
        reason = str(error).strip().partition("\n")[0]
        return [*found, f"{GRAPH}: the ONNX checker refuses it: {reason}"]
    dtype = {"fp32": "float32", "fp16": "float16"}[precision]
    shape = read_shape(source)
    found += _operator_problems(model, OPSET_OF_INT4 if low_bit == "INT4" else OPSET)
    found += _interface_problems(model.graph, shape, dtype)
    with open_tensors(source, leave_out=QUANTIZERS) as tensors:
        sizes = {name: tensors.header(name)[1] for name in tensors}
    if low_bit:
        with open_tensors(source, only=QUANTIZERS) as kept:
            for name in quantized_names(kept):
                del sizes[f"{name}.weight"]  # compared code by code
    found += _weight_problems(model.graph, sizes, dtype, tied=shape.tied)
    return [*found, *_constant_problems(model.graph, shape, config)]


def _refusals(onnx: Any) -> tuple[type[Exception], ...]:
    unreadable = require("google.protobuf.message", extra="onnx").DecodeError
    return onnx.checker.ValidationError, onnx.shape_inference.InferenceError, unreadable


def _place_problems(graph: Any, size: int) -> Iterator[str]:
    """Weights outside the one data file that belongs to the graph."""
    for tensor in graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if not place:
            continue
        location = place.get("location")
        end = int(place.get("offset", 0)) + int(place.get("length", 0))
        if location != DATA:
            yield f"{GRAPH}: {tensor.name} lies in {location!r}, not in {DATA}"
        elif end > size:
            yield f"{GRAPH}: {tensor.name} ends at byte {end:,} of {DATA}, which has {size:,}"


def _operator_problems(model: Any, opset: int) -> Iterator[str]:
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if opsets != {"": opset}:
        yield f"{GRAPH}: operator sets {opsets}, not the standard one in version {opset}"
    foreign = {f"{node.domain}.{node.op_type}" for node in model.graph.node if node.domain}
    if foreign or model.functions:
        yield f"{GRAPH}: operators that are not standard: {sorted(foreign) or 'functions'}"


def _interface_problems(graph: Any, shape: ModelShape, dtype: str) -> Iterator[str]:
    for side, expected, values in zip(
        ("input", "output"), interface(shape, dtype), (graph.input, graph.output), strict=True
    ):
        found = {value.name: _described(value) for value in values}
        if list(found) != list(expected):
            yield f"{GRAPH}: {side}s are {', '.join(found)}"
            continue
        for name, described in expected.items():
            if found[name] != described:
                yield f"{GRAPH}: {side} {name} is {found[name]}, source {described}"


def _described(value: Any) -> tuple[str, tuple[int | str, ...]]:
    kind = value.type.tensor_type
    dims = tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)
    return _dtype(kind.elem_type), dims


def _dtype(data_type: int) -> str:
    onnx: Any = require("onnx", extra="onnx")
    return str(onnx.helper.tensor_dtype_to_np_dtype(data_type))


def _weight_problems(
    graph: Any, sizes: dict[str, tuple[int, ...]], dtype: str, *, tied: bool
) -> Iterator[str]:
    """Compare every tensor of the source with the graph's: there, same shape, promised type."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for name, dims in sizes.items():
        if tied and name in TABLES:
            name = next((table for table in TABLES if table in stored), name)
        tensor = stored.get(name) or stored.get(f"{name}.transposed")
        if tensor is None:
            yield f"{GRAPH}: {name} is missing"
            continue
        found = tuple(tensor.dims) if tensor.name == name else tuple(tensor.dims)[::-1]
        if found != dims:
            yield f"{GRAPH}: {name} has shape {found}, source {dims}"
        if _dtype(tensor.data_type) != dtype:
            yield f"{GRAPH}: {name} is {_dtype(tensor.data_type)}, not {dtype}"


def _constant_problems(graph: Any, shape: ModelShape, config: dict[str, Any]) -> Iterator[str]:
    """Numbers that the source's configuration gives: epsilon, rotation, window."""
    onnx: Any = require("onnx", extra="onnx")
    small = {
        tensor.name: np.asarray(onnx.numpy_helper.to_array(tensor))
        for tensor in graph.initializer
        if not tensor.external_data
    }
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    epsilons = _constants(graph, small, made_by, ("Add", "ReduceMean"))
    expected = config.get("rms_norm_eps")
    if expected is not None and not all(isclose(e, expected, rel_tol=1e-5) for e in epsilons):
        yield f"{GRAPH}: norms have epsilon {sorted(set(epsilons))}, source {expected}"
    windows = set(_constants(graph, small, made_by, ("Sub", "Unsqueeze")))
    if windows != ({shape.window} if shape.window_layers else set()):
        yield f"{GRAPH}: windows are {sorted(windows)}, source {shape.window or 'none'}"
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") == "default" and "rope_theta" in rope:
        yield from _rotation_problems(small, float(rope["rope_theta"]))


def _constants(
    graph: Any, small: dict[str, np.ndarray], made_by: dict[str, str], what: tuple[str, str]
) -> list[float]:
    """Constants that an operator adds to (or takes from) the result of another."""
    operator, before = what
    return [
        float(small[name].item())
        for node in graph.node
        if node.op_type == operator and before in {made_by.get(name) for name in node.input}
        for name in node.input
        if name in small and small[name].size == 1
    ]


def _rotation_problems(small: dict[str, np.ndarray], theta: float) -> Iterator[str]:
    tables = [value for name, value in small.items() if name.endswith("inv_freq")]
    if not tables:
        yield f"{GRAPH}: no table of the rotation's frequencies"
    for table in tables:
        half = len(table)
        if not np.allclose(table, theta ** (-np.arange(half) / half), rtol=1e-4, atol=0):
            yield f"{GRAPH}: the rotation is not that of rope_theta {theta:g}"
