"""Choose an export lane from where the model will run, and say why.

What a runtime loads stands in its documentation: TensorRT-LLM from 1.3.0rc21 on has no engines and
loads Hugging Face folders; up to 1.2 it takes both (docs/lanes.md).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from trt_kd.architectures.shape import read_shape
from trt_kd.artifacts import Artifact
from trt_kd.artifacts.environment import environment
from trt_kd.config import StrictModel
from trt_kd.errors import ConfigError
from trt_kd.exporters import EXPORTERS
from trt_kd.exporters.base import Exporter

Runtime = Literal[
    "trtllm", "vllm", "sglang", "transformers", "ort-genai", "onnxruntime", "tensorrt-rtx"
]
_ENGINE_VERSIONS = (1, 2)
"""The last minor version of TensorRT-LLM that builds engines in a stable release."""

_ORDER: Mapping[Runtime, tuple[tuple[str, str], ...]] = {
    "vllm": (("hf-unified", "vLLM loads Hugging Face folders"),),
    "sglang": (("hf-unified", "SGLang loads Hugging Face folders"),),
    "transformers": (("hf-unified", "transformers loads Hugging Face folders"),),
    "ort-genai": (("ort-genai", "ONNX Runtime GenAI loads what its builder writes"),),
    "onnxruntime": (("onnx", "ONNX Runtime loads ONNX graphs"),),
    "tensorrt-rtx": (("tensorrt-rtx", "TensorRT for RTX runs its own engines"),),
}
"""Lanes that a runtime reads, the best first, each with its reason."""
_INTEGERS = {
    "int8": "INT8 products",
    "int8_smoothquant": "INT8 products",
    "int4_awq": "INT4 weights",
}
"""Formats that make steps quicker on a CPU too, and by what."""
_UNIFIED = ("hf-unified", "TensorRT-LLM's PyTorch backend loads Hugging Face folders")
_ENGINE = ("trtllm-engine", "TensorRT-LLM up to 1.2 runs engines")


class Deployment(StrictModel):
    """Where the model will run."""

    runtime: Runtime | None = None
    """What serves it; null takes what this machine suggests."""
    version: str | None = None
    """Version of TensorRT-LLM, such as ``1.2.1``; null is the newest."""
    gpu: str | None = None
    """Family of the GPU, such as ``hopper``, or ``cpu`` for none; null is this machine's."""


@dataclass(frozen=True)
class Choice:
    """A lane that takes the source, and how it was found."""

    lane: Exporter
    because: str
    passed_over: tuple[str, ...]
    """Lanes that came first and what they had against the source."""
    others: tuple[str, ...] = ()
    """Lanes that came later and would take the source too."""

    def explanation(self) -> list[str]:
        """Lines for a person to read; the last one names the choice."""
        return [*self.passed_over, *self.others, f"lane {self.lane.kind}: {self.because}"]


def choose(deployment: Deployment, source: Artifact) -> Choice:
    """The first lane for ``deployment`` that has nothing against ``source``.

    Raises:
        ConfigError: naming what every lane has against it, or that a setting has no effect.
    """
    passed_over: list[str] = []
    taking: list[tuple[Exporter, str]] = []
    for kind, because in _candidates(deployment, source):
        lane = EXPORTERS.load(kind).model_validate({"kind": kind})
        problems = lane.check(read_shape(source.path), source.manifest.kind)
        if problems := problems or lane.check_source(source):
            passed_over.append(f"not {kind}: {'; '.join(problems)}")
        else:
            taking.append((lane, because))
    if taking:
        (lane, because), *later = taking
        others = tuple(f"also possible, {one.kind}: {why}" for one, why in later)
        return Choice(lane, because, tuple(passed_over), others)
    raise ConfigError(
        f"no lane takes {source.path} there: {' | '.join(passed_over)}",
        hint="export another source, such as the checkpoint before quantization, or name another "
        f"target.runtime: {', '.join(get_args(Runtime))}",
    )


def _candidates(deployment: Deployment, source: Artifact) -> list[tuple[str, str]]:
    """Lanes to try, in their order, with the reason of each."""
    runtime = deployment.runtime
    if deployment.version is not None and runtime != "trtllm":
        raise ConfigError(
            f"target.version {deployment.version!r} has no effect without TensorRT-LLM",
            hint="leave it out, or set target.runtime=trtllm",
        )
    if runtime == "trtllm":
        return _for_trtllm(deployment, source)
    if runtime is not None:
        if deployment.gpu == "cpu" and runtime == "tensorrt-rtx":
            raise ConfigError(
                "tensorrt-rtx runs on GPUs only, target.gpu is cpu",
                hint="choose target.runtime=ort-genai or onnxruntime",
            )
        return list(_ORDER[runtime])
    machine = environment()["gpu"]
    gpu = deployment.gpu != "cpu" if deployment.gpu is not None else machine is not None
    where = f"the target has {deployment.gpu}" if deployment.gpu else f"this machine has {machine}"
    if gpu:
        return [("hf-unified", f"{where}: TensorRT-LLM, vLLM and SGLang load this folder")]
    return _without_gpu(deployment, source)


def _without_gpu(deployment: Deployment, source: Artifact) -> list[tuple[str, str]]:
    """What a machine without a GPU runs; a format that only GPUs compute in is meant for one.

    Unless the target is said to be a CPU: then what runs there comes first in any format.
    """
    where = "the target has no GPU" if deployment.gpu == "cpu" else "this machine has no GPU"
    folder = ("hf-unified", f"{where}: transformers loads Hugging Face folders")
    if source.manifest.kind != "quantized":
        return [
            ("ort-genai", f"{where}: ONNX Runtime GenAI is the fastest of the CPU runtimes here"),
            ("onnx", f"{where}: ONNX Runtime loads ONNX graphs"),
            folder,
        ]
    form = _format_kind(source)
    shipped = "a Hugging Face folder is what TensorRT-LLM, vLLM and SGLang load on one"
    if form in _INTEGERS:
        graph = ("onnx", f"{where}: ONNX Runtime computes with {_INTEGERS[form]} on a CPU")
        return [graph, ("hf-unified", f"for a GPU: {shipped}")]
    graph = ("onnx", f"{where}: ONNX Runtime runs {form} on a CPU, widened to float32, no faster")
    folder = ("hf-unified", f"{where}, and products in {form} are computed on GPUs: {shipped}")
    return [graph, folder] if deployment.gpu == "cpu" else [folder, graph]


def _for_trtllm(deployment: Deployment, source: Artifact) -> list[tuple[str, str]]:
    if deployment.gpu == "cpu":
        raise ConfigError(
            "TensorRT-LLM runs on GPUs only, target.gpu is cpu",
            hint="choose target.runtime=ort-genai or onnxruntime",
        )
    if not _has_engines(deployment.version):
        return [_UNIFIED]
    if source.manifest.kind == "quantized" and not _served(source):
        reason = "its PyTorch backend does not document this format, its engines do"
        return [("trtllm-engine", reason)]
    return [_UNIFIED, _ENGINE]


def _has_engines(version: str | None) -> bool:
    """Whether that TensorRT-LLM builds engines.

    Raises:
        ConfigError: if it is no version.
    """
    if version is None:
        return False
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        raise ConfigError(f"target.version {version!r} is no version", hint="write it as 1.2.1")
    return (int(found[1]), int(found[2])) <= _ENGINE_VERSIONS


def _served(source: Artifact) -> bool:
    """Whether TensorRT-LLM's PyTorch backend documents the format of ``source``."""
    return _format_kind(source) not in ("int8", "int8_smoothquant")


def _format_kind(source: Artifact) -> str:
    """Kind of the format of a quantized source."""
    settings: Any = source.manifest.config.get("format")
    return str(settings.get("kind") if isinstance(settings, Mapping) else settings)
