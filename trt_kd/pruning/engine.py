"""Score, choose, refit, cut: the order of events of one pruning."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trt_kd.architectures import architecture_of
from trt_kd.architectures.base import Architecture
from trt_kd.architectures.shape import ModelShape, shape_from_config
from trt_kd.measuring.progress import Steps
from trt_kd.pruning import AXES
from trt_kd.pruning.base import Axis, Importance, Place, Recording, WidthAxis
from trt_kd.pruning.depth import DepthAxis
from trt_kd.pruning.importance import BlockInfluence
from trt_kd.pruning.readings import (
    LinearReading,
    Reading,
    expert_readings,
    linear_readings,
    solve_group,
    stream_readings,
)
from trt_kd.pruning.reconstruction import Reconstruct, first_layers, kept_inputs
from trt_kd.pruning.ridge import PLAIN, Refit
from trt_kd.pruning.scores import Scores
from trt_kd.pruning.scoring import ForwardLoop, Layers, read, record
from trt_kd.pruning.sequential import capture, fold_points, refit_sequentially, spans

logger = logging.getLogger(__name__)


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
        self.late: set[str] = set()
        """Kinds of axes whose refit has to know what stays before it reads."""
        self.linears: list[LinearReading] = []
        """Projections that read cut units, as they run."""
        self.first: list[LinearReading] = []
        """Those whose Gram matrices are taken while scoring."""
        if request.reconstruct is not None:
            request.reconstruct.check(self.places)
            cut = {axis.kind for axis in request.axes if axis.target(shape) < axis.read(shape)}
            self.late = cut & {"hidden", "expert_ffn"}
            found = [place.consumer for kind in cut for place in self.places.get(kind, ())]
            consumers = [each for each in found if each is not None]
            self.linears = linear_readings(model, self.architecture, consumers)
            if request.reconstruct.schedule == "once" and not self.late:
                self.first = (request.reconstruct.grouped(self.linears) or [[]])[0]
                self.start(self.first)

    @property
    def refits(self) -> bool:
        """Whether anything reads units that are cut."""
        return bool(self.linears or self.late)

    def folds(self, keep: dict[str, list[Tensor]]) -> bool:
        """Whether layers are dropped that others can make up for."""
        reconstruct = self.request.reconstruct
        dropped = "depth" in keep and keep["depth"][0].numel() < self.shape.layers
        return dropped and reconstruct is not None and reconstruct.schedule == "sequential"

    def kept_layers(self, keep: dict[str, list[Tensor]]) -> list[int]:
        """Numbers of the layers that stay."""
        return keep["depth"][0].tolist() if "depth" in keep else list(range(self.shape.layers))

    def readings(self, keep: dict[str, list[Tensor]]) -> list[Reading]:
        """All that is refit in the layers that stay, as it runs."""
        found: list[Reading] = [*self.linears]
        if "hidden" in self.late:
            found += stream_readings(self.model, self.architecture, keep["hidden"][0])
        if "expert_ffn" in self.late:
            found += expert_readings(self.model, self.architecture, keep["expert_ffn"])
        kept = set(self.kept_layers(keep))
        chosen = [each for each in found if each.layer in kept or each.always]
        return sorted(chosen, key=lambda each: (each.layer, each.step))

    def read(self, group: Sequence[Reading]) -> None:
        """Fill the Gram matrices of ``group``, in a pass that ends with its last one's layer."""
        self.start(group)
        with first_layers(self.architecture.layers(self.model), 1 + group[-1].layer):
            read(self.model, self.forward_loop, group)

    def start(self, group: Sequence[Reading]) -> None:
        """Give all of ``group`` Gram matrices that have seen nothing."""
        for reading in group:
            if self.request.reconstruct is not None:
                reading.start(self.request.reconstruct.gram)


def score(
    model: PreTrainedModel, forward_loop: ForwardLoop, request: Request, shape: ModelShape
) -> Scores:
    """Score all that the axes could cut of ``model``, which stays as it is.

    Raises:
        ModelError: if activations are not finite.
    """
    recording = _score(_Subject(model, forward_loop, request, shape))
    generator = torch.Generator().manual_seed(request.seed)
    channels = {
        kind: [_summed(request.importance, totals, generator) for totals in places]
        for kind, places in recording.channels.items()
    }
    return Scores(channels, recording.influence, recording.tokens)


def shrink(
    model: PreTrainedModel,
    forward_loop: ForwardLoop,
    request: Request,
    shape: ModelShape,
    scores: Scores | None = None,
) -> dict[str, Any]:
    """Prune ``model`` of ``shape`` in place and return measurements, units in their names.

    Everything is scored on the unpruned model, so the axes' order does not matter. ``scores`` of
    this model, taken earlier, decide which channels stay.

    Raises:
        ModelError: if activations or a refit are not finite.
    """
    subject = _Subject(model, forward_loop, request, shape)
    started = time.perf_counter()
    recording = _score(subject, scores)
    pass_s = time.perf_counter() - started
    keep = _choose(request, recording, shape, scores)
    measured: dict[str, Any] = {
        "importance_pass_s": pass_s,
        "calibration_tokens": recording.tokens,
        "block_influence": recording.influence,
    }
    if "depth" in keep:
        measured["kept_layers"] = keep["depth"][0].tolist()
    if request.reconstruct is not None and (subject.refits or subject.folds(keep)):
        measured |= _reconstruct(subject, request.reconstruct, keep)
    # In the registry's order: what was recorded of a part must still meet that part.
    order = AXES.names()
    for axis in sorted(request.axes, key=lambda axis: order.index(axis.kind)):
        axis.cut(model, subject.architecture, keep[axis.kind])
    after = shape_from_config(model.config.to_dict())
    sizes = {axis.constraint: getattr(after, axis.shape_field) for axis in request.axes}
    return measured | {"kept_sizes": sizes}


def _score(subject: _Subject, known: Scores | None = None) -> Recording:
    """Record what is not known yet; no pass is made if that is nothing."""
    request = subject.request
    depth = [axis for axis in request.axes if isinstance(axis, DepthAxis) and axis.drop is None]
    layers = [Layers(axis.importance, axis.run_length(subject.shape)) for axis in depth]
    layers_known = layers in ([], [Layers(BlockInfluence(), 1)])
    if known is not None and layers_known and not subject.first:
        influence = list(known.influence)
        runs = [torch.tensor(value) for value in influence]
        return Recording(influence=influence, runs=runs, tokens=known.tokens)
    scored = subject.places if known is None else {}
    return record(
        subject.model,
        subject.architecture,
        subject.forward_loop,
        channels={kind: (request.importance, found) for kind, found in scored.items()},
        layers=layers[0] if layers else None,
        readings=subject.first,
    )


def _choose(
    request: Request, recording: Recording, shape: ModelShape, known: Scores | None
) -> dict[str, list[Tensor]]:
    """What every axis keeps, place by place."""
    generator = torch.Generator().manual_seed(request.seed)
    keep = {}
    for axis in request.axes:
        if isinstance(axis, DepthAxis):
            scores = [axis.importance.scores(total, generator) for total in recording.runs]
        elif known is not None:
            scores = known.of(axis.kind)
        else:
            places = recording.channels[axis.kind]
            scores = [_summed(request.importance, totals, generator) for totals in places]
        keep[axis.kind] = axis.keep(scores, shape)
    return keep


def _summed(importance: Importance, totals: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """Scores of one place, over all its sites."""
    return torch.stack([importance.scores(total, generator) for total in totals]).sum(0)


def _reconstruct(
    subject: _Subject, reconstruct: Reconstruct, keep: dict[str, list[Tensor]]
) -> dict[str, Any]:
    """Refit all on the unpruned model and write the solutions, or layer after layer."""
    inputs = kept_inputs(subject.places, keep)
    if reconstruct.schedule == "sequential":
        return _refit_sequentially(subject, reconstruct, keep, inputs)
    readings = subject.readings(keep)
    for reading in subject.first:
        if reading not in readings:
            reading.grams.clear()
    first = [each for each in readings if each.grams]
    rest = reconstruct.grouped([each for each in readings if not each.grams])
    if rest:
        logger.info(
            "%d readings to refit: memory_gib %g makes that %d more passes over the text",
            len(readings),
            reconstruct.memory_gib,
            len(rest),
        )
    with Steps("refitting", len(readings)) as steps:
        refits = solve_group(first, inputs, reconstruct.ridges, steps.step)
        for group in rest:
            subject.read(group)
            refits |= solve_group(group, inputs, reconstruct.ridges, steps.step)
    return _measured([(each, *pair) for each in readings for pair in refits[each]])


def _refit_sequentially(
    subject: _Subject,
    reconstruct: Reconstruct,
    keep: dict[str, list[Tensor]],
    inputs: dict[nn.Linear, Tensor],
) -> dict[str, Any]:
    """Refit what lost inputs, and what has to make up for the layers dropped behind it."""
    kept_layers = subject.kept_layers(keep)
    model, architecture = subject.model, subject.architecture
    layers = architecture.layers(model)
    kept = spans(kept_layers, len(layers))
    folds = fold_points(layers, architecture, kept)
    wanted = {fold: torch.arange(fold.in_features) for fold in folds} | inputs
    batches = capture(model, architecture, subject.forward_loop)
    refits = refit_sequentially(model, architecture, batches, wanted, kept, reconstruct)
    named = linear_readings(model, architecture, refits)
    return _measured([(each, each.name, refits[each.linear]) for each in named])


def _measured(refits: Sequence[tuple[Reading, str, Refit]]) -> dict[str, Any]:
    """What every refit lost, by layer before the cut and projection; a head has no layer."""
    found = [
        {
            "layer": None if reading.always else reading.layer,
            "projection": name,
            "residual": solution.residual,
            "plain_residual": solution.plain_residual,
            "ridge": None if solution.ridge == PLAIN else solution.ridge,
        }
        for reading, name, solution in refits
    ]
    return {"refits": found} if found else {}
