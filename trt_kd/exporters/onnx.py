"""ONNX with the key-value cache as inputs and outputs, for any runtime of standard operators.

The graph is one decoding step: tokens, the flat attention mask, positions and the cache go in,
logits and the longer cache come out, under the names of optimum and transformers.js. Batch, new
and cached length are free; an empty cache is the first step.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from trt_kd.architectures.shape import ModelShape, read_shape
from trt_kd.artifacts import Artifact, Kind
from trt_kd.artifacts.manifest import Metric
from trt_kd.checkpoints import copy_tokenizer, portable_config, read_json
from trt_kd.errors import ModelError
from trt_kd.exporters.base import Exporter
from trt_kd.exporters.onnx_writer import GRAPH
from trt_kd.optional import require
from trt_kd.quantization.base import QuantizationFormat
from trt_kd.quantization.int4 import Int4Awq

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trt_kd.exporters.onnx_qdq import LowBit

Precision = Literal["fp32", "fp16"]

MODEL_TYPES = ("gemma2", "llama", "mistral", "qwen2", "qwen3")
"""Model types whose graphs are tested here."""
LOW_BIT_TYPES = {
    "fp8": "FLOAT8E4M3FN",
    "int8": "INT8",
    "int8_smoothquant": "INT8",
    "int4_awq": "INT4",
}
"""Number formats that a graph can hold, each with ONNX's name of the type."""
LOW_BIT_KL_LIMIT_NATS = {"FLOAT8E4M3FN": 1e-3, "INT8": 1e-3, "INT4": 1e-6}
"""Largest mean KL per token to the simulated model, but for what rounding of inputs may add."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotations whose frequencies do not depend on the length, so that a graph can hold them."""


class Onnx(Exporter):
    """ONNX of standard operators with the cache as inputs and outputs, for any ONNX runtime.

    With fp16 the weights, activations and the cache are float16; norms, softmax, rotation and the
    logits stay in float32, as in the source's own code. The projections of a quantized source are
    written with its own scales, as QuantizeLinear and DequantizeLinear.
    """

    kind: Literal["onnx"] = "onnx"
    backend: ClassVar[str] = "onnxruntime"

    precision: Precision = "fp32"
    """Type of weights, activations and cache."""

    def check(self, shape: ModelShape, source_kind: Kind) -> list[str]:
        """See the base class."""
        if source_kind != "quantized":
            return graph_problems(self.kind, shape, source_kind)
        found = graph_problems(self.kind, shape, "checkpoint")
        if self.precision != "fp32":
            found.append(
                f"{self.kind} computes in fp32 between quantized products: many scales fall below "
                f"the range of {self.precision}; set precision=fp32"
            )
        return found

    def check_format(self, shape: ModelShape, quantization: QuantizationFormat) -> list[str]:
        """See the base class: formats that a graph can hold, the cache in its own type."""
        if quantization.kind not in LOW_BIT_TYPES:
            known = ", ".join(LOW_BIT_TYPES)
            return [
                f"format {quantization.kind} is not written by {self.kind}; those that are: {known}"
            ]
        if quantization.kv_cache != "none":
            cache = quantization.kv_cache
            instead = "quantize with kv_cache=none or export to hf-unified"
            return [f"{self.kind} keeps its cache in fp32, not in {cache}: {instead}"]
        return []

    def check_source(self, source: Artifact) -> list[str]:
        """See the base class: the number format of a quantized source."""
        if source.manifest.kind != "quantized":
            return []
        return self.check_format(read_shape(source.path), _format(source))

    def export(self, source: Artifact, out: Path) -> dict[str, Metric]:
        """See the base class."""
        if found := self.check_source(source):
            raise ModelError(f"{source.path} cannot go to {self.kind}: {found[0]}")
        return write_graph(source, out, self.precision)

    def problems(self, source: Artifact, out: Path) -> list[str]:
        """See the base class: the checker's view, names, sizes, types, norms and rotation.

        Of a quantized source also every code and scale, each against what calibration kept.
        """
        from trt_kd.exporters.onnx_check import problems

        if source.manifest.kind != "quantized":
            return problems(source.path, out, self.precision)
        from trt_kd.exporters.onnx_qdq_check import qdq_problems

        quantization = _format(source)
        kind = LOW_BIT_TYPES[quantization.kind]
        found = problems(source.path, out, self.precision, low_bit=kind)
        return found or qdq_problems(source.path, out, kind, block_of(quantization))

    def kl_limit_nats(self, source: Artifact) -> float:
        """See the base class: the same codes and scales, in another order of sums.

        Where inputs are rounded, the last bit of a sum decides between two codes and the layers
        after carry that on: a deep model is as far from itself when its embedding moves by a
        millionth. Two roundings that share nothing are twice as far (in KL) from each other as
        one is from the source; half of that is allowed. Codes and scales are checked one by one.
        """
        if source.manifest.kind != "quantized":
            return graph_kl_limit_nats(self.precision)
        kind = LOW_BIT_TYPES[_format(source).kind]
        rounding = source.metrics.get("kl_to_source_nats")
        carried = rounding if kind != "INT4" and isinstance(rounding, float) else 0.0
        return LOW_BIT_KL_LIMIT_NATS[kind] + carried


def graph_problems(lane: str, shape: ModelShape, source_kind: Kind) -> list[str]:
    """Reasons why ``lane`` cannot make a plain graph of a source of this shape and kind."""
    found = []
    if source_kind != "checkpoint":
        found.append(
            f"{lane} takes a plain checkpoint, not a {source_kind}: its graph holds no quantized "
            "weights; drop the quantization or export to hf-unified"
        )
    if shape.model_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        found.append(f"{lane} is not known to export {shape.model_type!r}; known: {known}")
    return found


def graph_kl_limit_nats(precision: Precision) -> float:
    """Largest mean KL per token of a graph to its source: rounding, in another order."""
    return {"fp32": 1e-8, "fp16": 1e-3}[precision]


def write_graph(source: Artifact, out: Path, precision: Precision) -> dict[str, Metric]:
    """Write the graph of ``source`` with its configuration and tokenizer; say what it holds.

    Raises:
        MissingDependencyError: if onnx is not installed.
        ModelError: if the rotation depends on the length or an operator is not known.
    """
    require("onnx", extra="onnx")
    from trt_kd.checkpoints import load_model
    from trt_kd.exporters.onnx_step import write_step

    config = portable_config(read_json(source.path / "config.json"))
    rope_type = (config.get("rope_parameters") or {}).get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise ModelError(
            f"{source.path}: rotation {rope_type!r} changes with the length; a graph holds "
            f"{', '.join(ROPE_TYPES)}",
            hint="export to hf-unified",
        )
    model = load_model(source.path, dtype={"fp32": "float32", "fp16": "float16"}[precision])
    low_bit: Mapping[str, LowBit] = {}
    if source.manifest.kind == "quantized":
        low_bit = _calibrated(model, source)
    nodes = write_step(model, read_shape(source.path), out, low_bit)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")
    if (source.path / "generation_config.json").is_file():
        shutil.copyfile(source.path / "generation_config.json", out / "generation_config.json")
    copy_tokenizer(source.path, out)
    return {"nodes": nodes, **_contents(out / GRAPH, bool(low_bit))}


def block_of(quantization: QuantizationFormat) -> int | None:
    """Weights along the input that share a scale, where they come in blocks."""
    return quantization.block_size if isinstance(quantization, Int4Awq) else None


def _format(source: Artifact) -> QuantizationFormat:
    from trt_kd.quantization.storage import format_of

    return format_of(source)


def _calibrated(model: "PreTrainedModel", source: Artifact) -> "dict[str, LowBit]":
    """Give ``model`` the weights that calibration changed; collect its quantized projections."""
    import torch

    from trt_kd.exporters.hf_unified_files import open_tensors
    from trt_kd.exporters.onnx_qdq import low_bit_of, quantized_names
    from trt_kd.quantization.storage import QUANTIZERS

    quantization = _format(source)
    kind, block = LOW_BIT_TYPES[quantization.kind], block_of(quantization)
    parameters = dict(model.named_parameters())
    with torch.no_grad(), open_tensors(source.path, only=QUANTIZERS) as kept:
        for name in set(kept) & set(parameters):
            parameters[name].copy_(kept[name])
        return {
            f"{name}.weight": low_bit_of(name, parameters[f"{name}.weight"], kept, kind, block)
            for name in quantized_names(kept)
        }


def _contents(graph: Path, quantized: bool) -> dict[str, Metric]:
    """What the written graph holds, read from it."""
    from trt_kd.exporters.onnx_graph import opset, weights_by_bits

    counts = weights_by_bits(graph)
    total = sum(counts.values())
    shares = {str(bits): count / total for bits, count in sorted(counts.items())}
    found: dict[str, Metric] = {"opset": opset(graph), "weight_share_by_bits": shares}
    if quantized:
        low = sum(count for bits, count in counts.items() if bits <= 8)
        found["realised_low_bit_share"] = low / total
    return found
