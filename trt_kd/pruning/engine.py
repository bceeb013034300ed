"""Score, choose, refit, cut: the order of events of one pruning."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trt_kd.architectures import architecture_of
from trt_kd.architectures.base import Architecture
from trt_kd.architectures.shape import ModelShape
from trt_kd.pruning import AXES
from trt_kd.pruning.base import Axis, Importance, Place, Recording, WidthAxis
from trt_kd.pruning.depth import DepthAxis
from trt_kd.pruning.reconstruction import Reconstruct, kept_inputs, refit_all, write_refits
from trt_kd.pruning.ridge import PLAIN, Refit
from trt_kd.pruning.scoring import ForwardLoop, Layers, record, record_gram
from trt_kd.pruning.sequential import capture, fold_points, refit_sequentially


@dataclass
class Request:
    """What to prune; every axis has its size."""

    axes: Sequence[Axis]
    importance: Importance
    reconstruct: Reconstruct | None
    seed: int


class _Subject:
    """A model under the knife, with the places that its axes cut."""

    def __init__(
        self,
        model: PreTrainedModel,
        forward_loop: ForwardLoop,
        request: Request,
        shape: ModelShape,
    ) -> None:
        self.model, self.forward_loop = model, forward_loop
        self.request, self.shape = request, shape
        self.architecture: Architecture = architecture_of(shape.model_type)
        self.places: dict[str, list[Place]] = {
            axis.kind: axis.places(model, self.architecture)
            for axis in request.axes
            if isinstance(axis, WidthAxis)
        }
        self.consumers: list[nn.Linear] = []
        self.groups: list[list[int]] = [[]]
        if request.reconstruct is not None:
            cut = [axis.kind for axis in request.axes if axis.target(shape) < axis.read(shape)]
            found = [place.consumer for kind in cut for place in self.places.get(kind, ())]
            self.consumers = list(dict.fromkeys(each for each in found if each is not None))
            widths = [consumer.in_features for consumer in self.consumers]
            if request.reconstruct.schedule == "once":
                self.groups = request.reconstruct.groups(widths)

    def folds(self, keep: dict[str, list[Tensor]]) -> bool:
        """Whether layers are dropped that others can make up for."""
        reconstruct = self.request.reconstruct
        dropped = "depth" in keep and keep["depth"][0].numel() < self.shape.layers
        return dropped and reconstruct is not None and reconstruct.schedule == "sequential"

    def group(self, number: int) -> list[nn.Linear]:
        """Projections whose Gram matrices are held at once."""
        return [self.consumers[index] for index in self.groups[number]]


def shrink(
    model: PreTrainedModel, forward_loop: ForwardLoop, request: Request, shape: ModelShape
) -> dict[str, Any]:
    """Prune ``model`` of ``shape`` in place and return measurements, units in their names.

    Everything is scored on the unpruned model, so the axes' order does not matter.

    Raises:
        ModelError: if activations or a refit are not finite.
    """
    subject = _Subject(model, forward_loop, request, shape)
    started = time.perf_counter()
    recording = _score(subject)
    pass_s = time.perf_counter() - started
    keep = _choose(request, recording, shape)
    measured: dict[str, Any] = {
        "importance_pass_s": pass_s,
        "calibration_tokens": recording.tokens,
        "block_influence": recording.influence,
        "kept_sizes": _kept_sizes(request.axes, shape),
    }
    if "depth" in keep:
        measured["kept_layers"] = keep["depth"][0].tolist()
    if request.reconstruct is not None and (subject.consumers or subject.folds(keep)):
        measured |= _reconstruct(subject, request.reconstruct, recording, keep)
    # In the registry's order: what was recorded of a part must still meet that part.
    order = AXES.names()
    for axis in sorted(request.axes, key=lambda axis: order.index(axis.kind)):
        axis.cut(model, subject.architecture, keep[axis.kind])
    return measured


def _kept_sizes(axes: Sequence[Axis], shape: ModelShape) -> dict[str, int]:
    planned = shape
    for axis in axes:
        planned = axis.write(planned, axis.target(shape))
    return {axis.constraint: getattr(planned, axis.shape_field) for axis in axes}


def _score(subject: _Subject) -> Recording:
    request = subject.request
    depth = [axis for axis in request.axes if isinstance(axis, DepthAxis) and axis.drop is None]
    layers = [Layers(axis.importance, axis.run_length(subject.shape)) for axis in depth]
    return record(
        subject.model,
        subject.architecture,
        subject.forward_loop,
        channels={kind: (request.importance, found) for kind, found in subject.places.items()},
        layers=layers[0] if layers else None,
        consumers=subject.group(0),
    )


def _choose(request: Request, recording: Recording, shape: ModelShape) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(request.seed)
    keep = {}
    for axis in request.axes:
        if isinstance(axis, DepthAxis):
            scores = [axis.importance.scores(total, generator) for total in recording.runs]
        else:
            scores = [
                torch.stack([request.importance.scores(total, generator) for total in totals]).sum(
                    0
                )
                for totals in recording.channels[axis.kind]
            ]
        keep[axis.kind] = axis.keep(scores, shape)
    return keep


def _reconstruct(
    subject: _Subject,
    reconstruct: Reconstruct,
    recording: Recording,
    keep: dict[str, list[Tensor]],
) -> dict[str, Any]:
    """Refit all on the unpruned model and write the solutions, or layer after layer."""
    inputs = kept_inputs(subject.places, keep)
    if reconstruct.schedule == "sequential":
        recording.gram.clear()
        return _refit_sequentially(subject, reconstruct, keep, inputs)
    refits = refit_all(recording.gram, inputs, reconstruct)
    recording.gram.clear()
    for number in range(1, len(subject.groups)):
        grams = record_gram(subject.model, subject.forward_loop, subject.group(number))
        refits |= refit_all(grams, inputs, reconstruct)
    write_refits(refits, inputs)
    return _measured([refits[consumer] for consumer in subject.consumers])


def _refit_sequentially(
    subject: _Subject,
    reconstruct: Reconstruct,
    keep: dict[str, list[Tensor]],
    inputs: dict[nn.Linear, Tensor],
) -> dict[str, Any]:
    """Refit what lost inputs, and what has to make up for the layers dropped behind it."""
    kept_layers = (
        keep["depth"][0].tolist() if "depth" in keep else list(range(subject.shape.layers))
    )
    model, architecture = subject.model, subject.architecture
    layers = architecture.layers(model)
    folds = fold_points(layers, architecture, kept_layers)
    wanted = {fold: torch.arange(fold.in_features) for fold in folds} | inputs
    batches = capture(model, architecture, subject.forward_loop)
    refits = refit_sequentially(
        model, architecture, batches, wanted, kept_layers, reconstruct.ridges
    )
    measured = _measured([refits[each] for each in subject.consumers if each in refits])
    alone = [refits[fold] for fold in folds if fold not in inputs]
    return measured | ({"fold_residual": [each.residual for each in alone]} if alone else {})


def _measured(refits: Sequence[Refit]) -> dict[str, Any]:
    if not refits:
        return {}
    return {
        "reconstruction_residual": [each.residual for each in refits],
        "plain_residual": [each.plain_residual for each in refits],
        "reconstruction_ridge": [None if each.ridge == PLAIN else each.ridge for each in refits],
    }
