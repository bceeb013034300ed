"""ONNX with the key-value cache as inputs and outputs, for any runtime of standard operators.

The graph is one decoding step: tokens, the flat attention mask, positions and the cache go in,
logits and the longer cache come out, under the names of optimum and transformers.js. Batch, new
and cached length are free; an empty cache is the first step.
"""

import json
import shutil
from pathlib import Path
from typing import ClassVar, Literal

from trt_kd.architectures.shape import ModelShape, read_shape
from trt_kd.artifacts import Artifact, Kind
from trt_kd.artifacts.manifest import Metric
from trt_kd.checkpoints import copy_tokenizer, portable_config, read_json
from trt_kd.errors import ModelError
from trt_kd.exporters.base import Exporter
from trt_kd.exporters.onnx_writer import GRAPH, OPSET
from trt_kd.optional import require

Precision = Literal["fp32", "fp16"]

MODEL_TYPES = ("gemma2", "llama", "mistral", "qwen2", "qwen3")
"""Model types whose graphs are tested here."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotations whose frequencies do not depend on the length, so that a graph can hold them."""


class Onnx(Exporter):
    """ONNX of standard operators with the cache as inputs and outputs, for any ONNX runtime.

    With fp16 the weights, activations and the cache are float16; norms, softmax, rotation and the
    logits stay in float32, as in the source's own code.
    """

    kind: Literal["onnx"] = "onnx"
    backend: ClassVar[str] = "onnxruntime"

    precision: Precision = "fp32"
    """Type of weights, activations and cache."""

    def check(self, shape: ModelShape, source_kind: Kind) -> list[str]:
        """See the base class."""
        return graph_problems(self.kind, shape, source_kind)

    def export(self, source: Artifact, out: Path) -> dict[str, Metric]:
        """See the base class."""
        return write_graph(source, out, self.precision)

    def problems(self, source: Artifact, out: Path) -> list[str]:
        """See the base class: the checker's view, names, sizes, types, norms and rotation."""
        from trt_kd.exporters.onnx_check import problems

        return problems(source.path, out, self.precision)

    def kl_limit_nats(self, source: Artifact) -> float:
        """See the base class."""
        return graph_kl_limit_nats(self.precision)


def graph_problems(lane: str, shape: ModelShape, source_kind: Kind) -> list[str]:
    """Reasons why ``lane`` cannot make a graph of a source of this shape and kind."""
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
    from trt_kd.exporters.onnx_graph import weights_by_bits
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
    nodes = write_step(model, read_shape(source.path), out)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")
    if (source.path / "generation_config.json").is_file():
        shutil.copyfile(source.path / "generation_config.json", out / "generation_config.json")
    copy_tokenizer(source.path, out)
    counts = weights_by_bits(out / GRAPH)
    total = sum(counts.values())
    shares = {str(bits): count / total for bits, count in sorted(counts.items())}
    return {"opset": OPSET, "nodes": nodes, "weight_share_by_bits": shares}
