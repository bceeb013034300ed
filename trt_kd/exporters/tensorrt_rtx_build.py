"""Compile an ONNX step with TensorRT for RTX, and read back what can be read without a GPU.

Two properties of the library (1.7): it compiles without a GPU, but an engine is deserialised, and
its layers inspected, only where a CUDA driver is. The network is strongly typed, so the types of
its layers are those of the engine.
"""

import json
import logging
from collections import Counter
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from trt_kd.artifacts.manifest import Metric
from trt_kd.errors import ModelError
from trt_kd.exporters.onnx_writer import DATA, GRAPH
from trt_kd.optional import require

if TYPE_CHECKING:
    from trt_kd.exporters.tensorrt_rtx import Profile, TensorrtRtx

log = logging.getLogger(__name__)

ENGINE, DESCRIPTION = "model.engine", "engine.json"
MAGIC = b"vtrt"
_HINT = "export to onnx instead, or report the operator"


def build(lane: "TensorrtRtx", out: Path) -> dict[str, Metric]:
    """Compile the graph in ``out`` for ``lane``; write the engine and its description.

    Raises:
        ModelError: if the compiler refuses the graph.
    """
    trt: Any = require("tensorrt_rtx", extra="tensorrt-rtx")
    start = perf_counter()
    logger = _logger(trt)
    builder = trt.Builder(logger)
    strong = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strong)
    _parse(trt.OnnxParser(network, logger), out / GRAPH)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    _target(trt, config, lane.compute_capabilities)
    for sizes in lane.profiles().values():
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            profile.set_shape(tensor.name, *_shapes(tensor.name, tuple(tensor.shape), sizes))
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        reason = logger.errors[-1] if logger.errors else "no message"
        raise ModelError(f"TensorRT for RTX cannot compile the graph: {reason}", hint=_HINT)
    (out / ENGINE).write_bytes(memoryview(plan))
    seconds = perf_counter() - start
    description = _described(trt, network, lane)
    (out / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return {
        "engine_bytes": (out / ENGINE).stat().st_size,
        "engine_build_s": seconds,
        "engine_executed": False,
        **_network_summary(trt, network),
        **_inspected(trt, logger, bytes(memoryview(plan))),
    }


def engine_problems(out: Path) -> list[str]:
    """What the header and the size of the engine in ``out`` say against it."""
    if missing := [name for name in (ENGINE, DESCRIPTION) if not (out / name).is_file()]:
        return [f"{missing[0]} is missing"]
    size = (out / ENGINE).stat().st_size
    with (out / ENGINE).open("rb") as file:
        header = file.read(24)
    if header[:4] != MAGIC:
        return [f"{ENGINE} does not start as an engine"]
    promised = int.from_bytes(header[16:24], "little")
    found = []
    if promised != size:
        found.append(f"{ENGINE} has {size:,} bytes, its header says {promised:,}")
    if size < (weights := (out / DATA).stat().st_size) // 2:
        found.append(f"{ENGINE} has {size:,} bytes, too few for {weights:,} bytes of weights")
    return found + _description_problems(out)


def _description_problems(out: Path) -> list[str]:
    """Compare the tensors that the compiler saw with the graph's."""
    onnx: Any = require("onnx", extra="onnx")
    graph = onnx.load(str(out / GRAPH), load_external_data=False).graph
    expected = {}
    for value in (*graph.input, *graph.output):
        kind = value.type.tensor_type
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
        dims = [-1 if dim.dim_param else dim.dim_value for dim in kind.shape.dim]
        expected[value.name] = {"dtype": dtype, "shape": dims}
    try:
        found = json.loads((out / DESCRIPTION).read_text(encoding="utf-8"))["tensors"]
    except (ValueError, KeyError) as error:
        return [f"{DESCRIPTION} cannot be read: {error}"]
    names = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    return [f"{DESCRIPTION}: {n} is {found.get(n)}, graph {expected.get(n)}" for n in names]


def _logger(trt: Any) -> Any:
    """Return a logger of the library that writes into ours and keeps the errors."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))
            log.debug("TensorRT: %s", message)

    return Logger()


def _parse(parser: Any, path: Path) -> None:
    if not parser.parse_from_file(str(path)):
        reasons = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        reason = " ".join((reasons or ["no message"])[0].split())
        raise ModelError(f"TensorRT for RTX cannot read the graph: {reason}", hint=_HINT)


def _target(trt: Any, config: Any, capabilities: tuple[str, ...]) -> None:
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        name = f"SM{capability.replace('.', '')}"
        config.set_compute_capability(getattr(trt.ComputeCapability, name), index)


def _shapes(name: str, shape: tuple[int, ...], sizes: "Profile") -> list[tuple[int, ...]]:
    """Least, best and largest shape of an input of the step."""
    if name.startswith("past_key_values."):
        return [(batch, shape[1], past, shape[3]) for batch, _, past in sizes]
    if name == "attention_mask":
        return [(batch, past + new) for batch, new, past in sizes]
    return [(batch, new) for batch, new, _ in sizes]


def _described(trt: Any, network: Any, lane: "TensorrtRtx") -> dict[str, Any]:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    return {
        "tensorrt_rtx": trt.__version__,
        "compute_capabilities": list(lane.compute_capabilities),
        "built_from": GRAPH,
        "tensors": {
            tensor.name: {"dtype": _dtype(trt, tensor.dtype), "shape": list(tensor.shape)}
            for tensor in (*inputs, *outputs)
        },
        "profiles": {
            name: {
                tensor.name: _shapes(tensor.name, tuple(tensor.shape), sizes) for tensor in inputs
            }
            for name, sizes in lane.profiles().items()
        },
    }


def _network_summary(trt: Any, network: Any) -> dict[str, Metric]:
    """Layers by type, and matrix products by the precision of their result."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    types = Counter(layer.type.name.lower() for layer in layers)
    products = Counter(
        _dtype(trt, layer.get_output(0).dtype)
        for layer in layers
        if layer.type == trt.LayerType.MATRIX_MULTIPLY
    )
    return {
        "network_layers": dict(sorted(types.items())),
        "matrix_products_by_precision": dict(sorted(products.items())),
    }


def _inspected(trt: Any, logger: Any, plan: bytes) -> dict[str, Metric]:
    """Layers of the engine by the inspector, where a CUDA driver lets an engine be opened."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        return {"engine_inspected": False}
    form = trt.LayerInformationFormat.JSON
    layers = json.loads(engine.create_engine_inspector().get_engine_information(form))["Layers"]
    return {
        "engine_inspected": True,
        "engine_layers": len(layers),
        "engine_tensors": engine.num_io_tensors,
        "engine_profiles": engine.num_optimization_profiles,
    }


def _dtype(trt: Any, dtype: Any) -> str:
    return str(trt.nptype(dtype).__name__)
