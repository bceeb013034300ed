"""TensorRT for RTX: an engine compiled from the ONNX step, on any machine, no GPU needed.

The engine stands beside the graph it was built from. The graph is read back and compared with the
source; the engine itself runs only where an RTX GPU is, so what is checked of it without one is
what its file and the network it was compiled from say.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator
from typing_extensions import Self

from trt_kd.architectures.shape import ModelShape
from trt_kd.artifacts import Artifact, Kind
from trt_kd.artifacts.manifest import Metric
from trt_kd.checkpoints import read_json
from trt_kd.errors import ModelError
from trt_kd.exporters.base import Exporter
from trt_kd.exporters.onnx import Precision, graph_kl_limit_nats, graph_problems, write_graph
from trt_kd.optional import require

Capability = Literal["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"]
Profile = list[tuple[int, int, int]]
"""Batch, new positions and cached positions: the least, the best, the largest."""


class TensorrtRtx(Exporter):
    """TensorRT for RTX GPUs: an engine built from the ONNX step, without a GPU.

    Two optimisation profiles: one for prompts, one for steps of a single token.
    """

    kind: Literal["tensorrt-rtx"] = "tensorrt-rtx"
    backend: ClassVar[str] = "onnxruntime"

    precision: Precision = "fp16"
    """Type of weights, activations and cache."""
    compute_capabilities: Annotated[tuple[Capability, ...], Field(min_length=1)] = (
        "8.6",
        "8.9",
        "12.0",
    )
    """GPUs that the engine shall run on: 8.6 Ampere, 8.9 Ada, 12.0 Blackwell."""
    max_batch: PositiveInt = 8
    """Largest number of sequences in a batch; any from 1 up will do."""
    optimal_batch: PositiveInt = 1
    """Batch that the kernels are chosen for; at most ``max_batch``."""
    input_tokens: PositiveInt = 1024
    """Longest prompt, or piece of a prompt, in one step."""
    max_tokens: PositiveInt = 2048
    """Longest sequence, prompt and answer together; more than ``input_tokens``."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.optimal_batch > self.max_batch:
            raise ValueError(f"optimal_batch {self.optimal_batch} exceeds max_batch")
        if self.input_tokens >= self.max_tokens:
            raise ValueError(f"input_tokens {self.input_tokens} leave no room below max_tokens")
        if len(set(self.compute_capabilities)) < len(self.compute_capabilities):
            raise ValueError("compute_capabilities name one twice")
        return self

    @property
    def executed(self) -> bool:
        """See the base class."""
        return False

    def check(self, shape: ModelShape, source_kind: Kind) -> list[str]:
        """See the base class."""
        return graph_problems(self.kind, shape, source_kind)

    def export(self, source: Artifact, out: Path) -> dict[str, Metric]:
        """See the base class: the graph, then the engine."""
        require("tensorrt_rtx", extra="tensorrt-rtx")
        from trt_kd.exporters.tensorrt_rtx_build import build

        context = read_json(source.path / "config.json").get("max_position_embeddings")
        if context is not None and self.max_tokens > context:
            raise ModelError(
                f"max_tokens {self.max_tokens} exceed the model's context of {context}",
                hint=f"set max_tokens to {context} or less, input_tokens below that",
            )
        return write_graph(source, out, self.precision) | build(self, out)

    def problems(self, source: Artifact, out: Path) -> list[str]:
        """See the base class: the graph's, and what the engine's own header says."""
        from trt_kd.exporters.onnx_check import problems
        from trt_kd.exporters.tensorrt_rtx_build import engine_problems

        return problems(source.path, out, self.precision) + engine_problems(out)

    def rehearsal(self) -> Self:
        """Compile for one GPU generation."""
        return self.model_copy(update={"compute_capabilities": self.compute_capabilities[:1]})

    def kl_limit_nats(self, source: Artifact) -> float:
        """See the base class."""
        return graph_kl_limit_nats(self.precision)

    def profiles(self) -> dict[str, Profile]:
        """Least, best and largest sizes of each optimisation profile."""
        batch = (1, self.optimal_batch, self.max_batch)
        new = (1, self.input_tokens, self.input_tokens)
        before, last = self.max_tokens - self.input_tokens, self.max_tokens - 1
        return {
            "prompt": list(zip(batch, new, (0, 0, before), strict=True)),
            "step": list(zip(batch, (1, 1, 1), (0, last // 2, last), strict=True)),
        }
