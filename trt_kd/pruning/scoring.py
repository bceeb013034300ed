"""One hooked forward pass that records all that pruning wants to know of the unpruned model.

What asks for the loss takes more passes over the same tokens, see ``loss_passes.py``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trt_kd.architectures.base import Architecture
from trt_kd.architectures.hooks import Hook, evaluating, hooks
from trt_kd.errors import ModelError
from trt_kd.pruning import loss_passes
from trt_kd.pruning.base import Importance, Place, Recording, Site
from trt_kd.pruning.importance import BlockInfluence
from trt_kd.pruning.readings import Reading

ForwardLoop = Callable[[nn.Module], None]
Channels = Mapping[str, tuple[Importance, Sequence[Place]]]


@dataclass
class Layers:
    """How runs of neighbouring layers are judged."""

    importance: Importance
    run_length: int


def record(
    model: PreTrainedModel,
    architecture: Architecture,
    forward_loop: ForwardLoop,
    *,
    channels: Channels,
    layers: Layers | None,
    readings: Sequence[Reading],
) -> Recording:
    """Run ``forward_loop`` once and return what all axes need, summed batch by batch.

    ``channels`` names importance and places by kind of axis; ``readings`` are shown
    what enters them.

    Raises:
        ModelError: if an activation is not finite, or nothing was run.
    """
    recording = Recording()
    residual = _Residual(layers, len(architecture.layers(model)))
    with hooks() as hook, loss_passes.fed_tokens(architecture.body(model)) as batches:
        for kind, (importance, places) in channels.items():
            totals = [
                [torch.zeros(place.units, dtype=torch.float64) for _ in place.sites]
                for place in places
            ]
            recording.channels[kind] = totals
            if importance.evidence == "states":
                _record_channels(importance, places, totals, hook)
        residual.watch(_residual_readers(model, architecture), hook)
        for reading in readings:
            reading.watch(hook)
        _forward(model, forward_loop)
    if residual.tokens == 0:
        raise ModelError("the forward loop ran no batch", hint="give it calibration text")
    residual.write(recording)
    _check_finite(recording)
    _check_readings(readings)
    if _record_losses(model, architecture, batches, channels, layers, recording):
        _check_finite(recording)
    for places_totals in recording.channels.values():
        places_totals[:] = [[total.cpu() for total in totals] for totals in places_totals]
    recording.runs = [total.cpu() for total in recording.runs]
    return recording


def read(model: PreTrainedModel, forward_loop: ForwardLoop, readings: Sequence[Reading]) -> None:
    """Show ``readings`` what enters them, in one more pass.

    Raises:
        ModelError: if an activation is not finite.
    """
    with hooks() as hook:
        for reading in readings:
            reading.watch(hook)
        _forward(model, forward_loop)
    _check_readings(readings)


def states(site: Site, state: Tensor) -> Tensor:
    """One number per unit in the last dimension: what passes at ``site``, read as it says."""
    if site.read is not None:
        return site.read(state)
    if site.width == 1:
        return state
    units = state.float().reshape(*state.shape[:-1], -1, site.width)
    result: Tensor = torch.linalg.vector_norm(units, dim=-1)
    return result


def _forward(model: PreTrainedModel, forward_loop: ForwardLoop) -> None:
    with evaluating(model), torch.no_grad():
        forward_loop(model)


def _record_channels(
    importance: Importance, places: Sequence[Place], totals: Sequence[list[Tensor]], hook: Hook
) -> None:
    for place, sums in zip(places, totals, strict=True):
        for index, site in enumerate(place.sites):
            hook(site.module, site.side, partial(_add_channels, importance, sums, index, site))


def _add_channels(
    importance: Importance, sums: list[Tensor], index: int, site: Site, state_BLC: Tensor
) -> None:
    importance.accumulate(sums, index, importance.contribution(states(site, state_BLC.detach())))


def _residual_readers(model: PreTrainedModel, architecture: Architecture) -> list[nn.Module]:
    """The layers and the final norm: what enters them is the residual stream."""
    return [*architecture.layers(model), architecture.final_norm(model)]


class _Residual:
    """Judges layers by the residual stream, of which it holds no more than one run's length.

    Totals stay on their devices until the end: to read one is to wait for its device.
    """

    def __init__(self, layers: Layers | None, depth: int) -> None:
        self.tokens, self.depth = 0, depth
        self.block = BlockInfluence()
        self.influence = loss_passes.no_totals(depth)
        self.layers = layers if layers and layers.importance.evidence == "states" else None
        # Most often runs are single layers, judged by what is measured anyway.
        self.shared = self.layers == Layers(self.block, 1)
        count = depth - self.layers.run_length + 1 if self.layers and not self.shared else 0
        self.runs = loss_passes.no_totals(count)
        self.stream: dict[int, Tensor] = {}

    def watch(self, modules: Sequence[nn.Module], hook: Hook) -> None:
        """Observe what enters ``modules``."""
        for index, module in enumerate(modules):
            hook(module, "input", partial(self._observe, index))

    def write(self, recording: Recording) -> None:
        """Hand over the totals."""
        recording.tokens = self.tokens
        recording.influence = [float(total) / self.tokens for total in self.influence]
        recording.runs = list(self.influence) if self.shared else self.runs

    def _observe(self, index: int, state_BLH: Tensor) -> None:
        if index == 0:
            self.stream.clear()
        self.stream[index] = state_BLH.detach()
        self._add(self.influence, self.block, index - 1, index)
        held = 1
        if self.runs and self.layers:
            held = self.layers.run_length
            self._add(self.runs, self.layers.importance, index - held, index)
        self.stream.pop(index - held, None)
        if index == self.depth:
            self.tokens += state_BLH.shape[0] * state_BLH.shape[1]
            self.stream.clear()

    def _add(self, totals: list[Tensor], importance: Importance, first: int, last: int) -> None:
        if first < 0:
            return
        after = self.stream[last]
        before = self.stream[first].to(after.device)
        importance.accumulate(totals, first, importance.contribution(before, after))


def _record_losses(
    model: PreTrainedModel,
    architecture: Architecture,
    batches: Sequence[loss_passes.Batch],
    channels: Channels,
    layers: Layers | None,
    recording: Recording,
) -> bool:
    """Run the passes of importances that are shown more than states, if there are any."""
    asked = {importance.evidence for importance, _ in channels.values()}
    asked |= {layers.importance.evidence} if layers else set()
    asked -= {"states"}
    if asked and not batches:
        raise ModelError(
            "the importance asks for the loss, and the forward loop fed no token ids",
            hint="let the loop pass input_ids, or choose an importance that needs no loss",
        )
    if "gradients" in asked:
        with hooks() as hook:
            for kind, (importance, places) in channels.items():
                if importance.evidence == "gradients":
                    loss_passes.watch_channels(importance, places, recording.channels[kind], hook)
            if layers and layers.importance.evidence == "gradients":
                recording.runs = loss_passes.watch_layers(
                    layers.importance,
                    layers.run_length,
                    _residual_readers(model, architecture),
                    hook,
                )
            loss_passes.backward(model, architecture, batches)
    if layers and layers.importance.evidence == "losses":
        recording.runs = loss_passes.skipping_losses(
            model, architecture, batches, layers.importance, layers.run_length
        )
    return bool(asked)


def _check_finite(recording: Recording) -> None:
    for kind, places in recording.channels.items():
        for index, totals in enumerate(places):
            for total in totals:
                _refuse(total, f"place {index} of axis {kind!r}")
    for index, influence in enumerate(recording.influence):
        _refuse(torch.tensor(influence), f"layer {index}")
    for index, total in enumerate(recording.runs):
        _refuse(total, f"the layers from {index} on")


def _check_readings(readings: Sequence[Reading]) -> None:
    for reading in readings:
        for gram in reading.grams:
            _refuse(gram.sum.gram, f"a projection to refit in layer {reading.layer}")


def _refuse(total: Tensor, where: str) -> None:
    if not bool(torch.isfinite(total).all()):
        raise ModelError(
            f"activations at {where} are not finite",
            hint="the checkpoint is damaged, or its weights overflow in this dtype",
        )
