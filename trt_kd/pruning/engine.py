"""Score, choose, refit, cut: the order of events of one pruning."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trt_kd.architectures import architecture_of
from trt_kd.architectures.base import Architecture
from trt_kd.architectures.shape import ModelShape
from trt_kd.pruning.base import Axis, Importance, Recording
from trt_kd.pruning.depth import DepthAxis
from trt_kd.pruning.reconstruction import Reconstruct, refit_layers, write_refits
from trt_kd.pruning.scoring import ForwardLoop, Layers, record, record_gram


@dataclass
class Request:
    """What to prune; every axis has its size."""

    axes: Sequence[Axis]
    importance: Importance
    reconstruct: Reconstruct | None
    seed: int

    def gram_groups(self, shape: ModelShape) -> list[list[int]]:
        """Layers whose Gram matrices are held at once; one empty group where none is needed."""
        cuts_ffn = any(axis.kind == "ffn" and axis.target(shape) < shape.ffn for axis in self.axes)
        if self.reconstruct is None or not cuts_ffn:
            return [[]]
        return self.reconstruct.groups(shape)


@dataclass
class _Subject:
    model: PreTrainedModel
    architecture: Architecture
    forward_loop: ForwardLoop
    shape: ModelShape


def shrink(
    model: PreTrainedModel, forward_loop: ForwardLoop, request: Request, shape: ModelShape
) -> dict[str, Any]:
    """Prune ``model`` of ``shape`` in place and return measurements, units in their names.

    Everything is scored and refitted on the unpruned model, so the axes' order does not matter.

    Raises:
        ModelError: if activations or a refit are not finite.
    """
    subject = _Subject(model, architecture_of(shape.model_type), forward_loop, shape)
    groups = request.gram_groups(shape)
    started = time.perf_counter()
    recording = _score(subject, request, groups[0])
    pass_s = time.perf_counter() - started
    keep = _choose(request, recording, shape)
    measured = {
        "importance_pass_s": pass_s,
        "calibration_tokens": recording.tokens,
        "block_influence": recording.influence,
        "kept_sizes": {axis.constraint: axis.target(shape) for axis in request.axes},
    }
    if "depth" in keep:
        measured["kept_layers"] = keep["depth"][0].tolist()
    if request.reconstruct is not None and groups != [[]]:
        ridge = request.reconstruct.ridge
        measured |= _reconstruct(subject, recording, groups, keep["ffn"], ridge)
    # Channels first: what was recorded of a layer must still meet that layer.
    for axis in sorted(request.axes, key=lambda axis: axis.unit == "layers"):
        axis.cut(model, subject.architecture, keep[axis.kind])
    return measured


def _score(subject: _Subject, request: Request, gram_layers: Sequence[int]) -> Recording:
    channels = {
        axis.kind: (request.importance, axis.sites(subject.model, subject.architecture))
        for axis in request.axes
        if axis.unit == "channels"
    }
    depth = [axis for axis in request.axes if isinstance(axis, DepthAxis)]
    layers = [Layers(axis.importance, axis.run_length(subject.shape)) for axis in depth]
    return record(
        subject.model,
        subject.architecture,
        subject.forward_loop,
        channels=channels,
        layers=layers[0] if layers else None,
        gram_layers=gram_layers,
    )


def _choose(request: Request, recording: Recording, shape: ModelShape) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(request.seed)
    keep = {}
    for axis in request.axes:
        importance = axis.importance if isinstance(axis, DepthAxis) else request.importance
        totals = recording.runs if axis.unit == "layers" else recording.channels[axis.kind]
        scores = [importance.scores(total, generator) for total in totals]
        keep[axis.kind] = axis.keep(scores, shape)
    return keep


def _reconstruct(
    subject: _Subject,
    recording: Recording,
    groups: list[list[int]],
    keep: list[Tensor],
    ridge: float,
) -> dict[str, Any]:
    """Refit group by group on the unpruned model, then write all solutions."""
    model, architecture = subject.model, subject.architecture
    refits = refit_layers(model, architecture, recording.gram, keep, ridge)
    recording.gram.clear()
    for layers in groups[1:]:
        gram_CC = record_gram(model, architecture, subject.forward_loop, layers)
        refits |= refit_layers(model, architecture, gram_CC, keep, ridge)
    write_refits(model, architecture, refits, keep)
    return {
        "reconstruction_residual": [refits[layer].residual for layer in sorted(refits)],
        "plain_residual": [refits[layer].plain_residual for layer in sorted(refits)],
    }
