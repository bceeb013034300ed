"""What every backend does: load a directory, tell logits, decode step by step.

A backend knows nothing about clocks, percentiles or tables; see ``trt_kd.measuring``.

Shape suffixes: B sequences of a batch, L positions of a sequence, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import ClassVar

import numpy as np
from pydantic import PositiveInt
from typing_extensions import Self

from trt_kd.architectures.shape import ModelShape
from trt_kd.artifacts import Artifact
from trt_kd.backends import BACKENDS
from trt_kd.config import Plugin
from trt_kd.errors import ArtifactError
from trt_kd.measuring.roofline import DecodeWork

BACKEND_OF_LANE = {"onnx": "onnxruntime"}
"""Lanes whose backend has another name than theirs."""


class Backend(Plugin, ABC):
    """A runtime and its options."""

    reads: ClassVar[tuple[str, ...]] = ()
    """What it loads besides exports of the lane that has its name: ``checkpoint``, other lanes."""
    gives_logits: ClassVar[bool] = True
    """Whether its sessions tell logits, so that exports can be compared and evaluated in it."""

    threads: PositiveInt | None = None
    """CPU threads of the runtime; None leaves the choice to the runtime."""

    def check(self) -> None:
        """Check, without a model, that the runtime is here; ``load`` finds what else is wrong.

        Raises:
            MissingDependencyError: if it is not, as far as that can be told before it is loaded.
        """

    @abstractmethod
    def load(self, directory: Path) -> "Session":
        """Load the model in ``directory``; close the session to free its memory.

        Raises:
            MissingDependencyError: if the runtime is not installed.
            ModelError: if the directory holds nothing this runtime can load.
        """

    def on_gpu(self) -> bool:
        """Whether it runs on an NVIDIA GPU of this machine, whose state is then recorded."""
        return False

    def decode_work(self, directory: Path) -> DecodeWork | None:
        """What one decoding step reads and computes on a CPU; None where that is not known."""
        return None


def work_of(shape: ModelShape, *, weight_bytes: float, kv_bytes: float) -> DecodeWork:
    """What a step of ``shape`` reads and computes, with so many bytes per weight and cached value.

    Of experts only those count that one token passes through: a batch may touch no more.
    """
    picked = 0 if shape.tied else shape.vocab * shape.hidden
    weights = shape.active_parameters - picked
    channels = shape.heads * shape.head_dim
    return DecodeWork(
        weight_bytes=int(weight_bytes * weights),
        weights=weights,
        kv_bytes_per_token=shape.kv_bytes_per_token(kv_bytes),
        head_weights=shape.vocab * shape.hidden,
        attention_channels=(shape.layers - shape.window_layers) * channels,
        window_channels=shape.window_layers * channels,
        window=shape.window,
    )


class Session(ABC):
    """A loaded model. A context manager: leaving it closes it."""

    vocab_size: int
    """Columns of the logits."""
    compiles: bool = False
    """Whether ``compile`` has something to do."""

    def compile(self, prompts: list[list[int]], new_tokens: int) -> None:  # noqa: B027
        """Compile for prompts of this number and length, unless that was just done.

        Harnesses call it before ``steps`` and time it apart.
        """

    @abstractmethod
    def logits(self, tokens_BL: np.ndarray) -> np.ndarray:
        """Next-token logits after every position.

        Shapes: tokens_BL ``[B, L]`` integer ids, no padding; returns ``[B, L, V]`` float32.
        Nothing is kept between calls.
        """

    @abstractmethod
    def steps(self, prompts: list[list[int]], new_tokens: int) -> Iterator[None]:
        """Decode greedily; yield once per step of the whole batch, after the device finished it.

        The first step includes prefill. Exactly ``new_tokens`` steps: end-of-text is ignored, so
        that every backend does the same work. The prompts have one length.

        Raises:
            ValueError: if there is no prompt or their lengths differ.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the model's memory; closing twice does no harm."""

    def __enter__(self) -> Self:
        """Return the session itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the session."""
        self.close()


def rectangle(prompts: list[list[int]]) -> np.ndarray:
    """Return ``prompts`` as an ``[B, L]`` int64 array.

    Raises:
        ValueError: if there is no prompt, one is empty or their lengths differ.
    """
    lengths = {len(prompt) for prompt in prompts}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"prompts must have one length above 0, got {sorted(lengths)}")
    return np.asarray(prompts, dtype=np.int64)


def backend_for(artifact: Artifact) -> Backend:
    """Backend that runs ``artifact``: stock checkpoints in transformers, exports in their lane.

    Raises:
        ArtifactError: if it is neither a checkpoint nor an export, or no backend runs its lane.
    """
    form = form_of(artifact)
    if form == "checkpoint":
        return BACKENDS.load("transformers").model_validate({"kind": "transformers"})
    lane = BACKEND_OF_LANE.get(form, form)
    if lane not in BACKENDS.names() and ":" not in lane:
        raise ArtifactError(
            f"{artifact.path}: no backend runs the lane {lane!r}; "
            f"available: {', '.join(BACKENDS.names())}",
            hint="export to a lane that has a backend, or measure it with the runtime's own tools",
        )
    return BACKENDS.load(lane).model_validate({"kind": lane})


def check_reads(backend: Backend, artifact: Artifact) -> None:
    """Check that ``backend`` loads what ``artifact`` is; a user's own is taken at its word.

    Raises:
        ArtifactError: if it does not.
    """
    form = form_of(artifact)
    known = {backend.kind, *backend.reads}
    if BACKEND_OF_LANE.get(form, form) not in known and ":" not in backend.kind:
        raise ArtifactError(
            f"{artifact.path}: backend {backend.kind} does not load a {form}",
            hint=f"it loads: {', '.join(sorted(known))}; or leave the choice of backend out",
        )


def form_of(artifact: Artifact) -> str:
    """``checkpoint``, or the lane of an export.

    Raises:
        ArtifactError: if ``artifact`` is neither, or does not say its lane.
    """
    return (
        "checkpoint" if artifact.manifest.kind == "checkpoint" else str(lane_of(artifact)["kind"])
    )


def lane_of(artifact: Artifact) -> Mapping[str, object]:
    """Settings of the lane an export was made for.

    Raises:
        ArtifactError: if ``artifact`` is no export.
    """
    if artifact.manifest.kind != "export":
        raise ArtifactError(
            f"{artifact.path} is of kind {artifact.manifest.kind}, which no backend runs",
            hint="give a checkpoint or an export",
        )
    lane = artifact.manifest.config.get("lane")
    if isinstance(lane, str):
        return {"kind": lane}
    if not isinstance(lane, Mapping):
        raise ArtifactError(
            f"{artifact.path} does not say its lane", hint="run the export stage again"
        )
    return lane
