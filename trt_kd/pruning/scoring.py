"""One hooked forward pass that records all that pruning wants to know of the unpruned model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trt_kd.architectures.base import Architecture
from trt_kd.errors import ModelError
from trt_kd.pruning.base import Importance, Recording, Site
from trt_kd.pruning.importance import BlockInfluence

ForwardLoop = Callable[[nn.Module], None]


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
    channels: Mapping[str, tuple[Importance, Sequence[Site]]],
    layers: Layers | None,
    gram_layers: Sequence[int],
) -> Recording:
    """Run ``forward_loop`` once and return what all axes need, summed batch by batch.

    ``channels`` names importance and sites by kind of axis; ``gram_layers`` are the layers whose
    Gram matrices are kept, each ``C * C * 4`` bytes.

    Raises:
        ModelError: if an activation is not finite, or nothing was run.
    """
    recording = Recording()
    with _hooks() as hook:
        for kind, (importance, sites) in channels.items():
            totals: list[Tensor] = recording.channels.setdefault(kind, [])
            for index, site in enumerate(sites):
                hook(site, partial(_add_channels, totals, index, importance))
        _record_residual(model, architecture, recording, layers, hook)
        _record_gram(model, architecture, recording, gram_layers, hook)
        _forward(model, forward_loop)
    if recording.tokens == 0:
        raise ModelError("the forward loop ran no batch", hint="give it calibration text")
    recording.influence = [total / recording.tokens for total in recording.influence]
    _check_finite(recording)
    return recording


def record_gram(
    model: PreTrainedModel,
    architecture: Architecture,
    forward_loop: ForwardLoop,
    layers: Sequence[int],
) -> dict[int, Tensor]:
    """Gram matrices of the inputs of the down projections of ``layers``, in one more pass."""
    recording = Recording()
    with _hooks() as hook:
        _record_gram(model, architecture, recording, layers, hook)
        _forward(model, forward_loop)
    _check_finite(recording)
    return recording.gram


Observe = Callable[[Tensor], None]
Hook = Callable[[Site, Observe], None]


@contextmanager
def _hooks() -> Iterator[Hook]:
    handles = []

    def hook(site: Site, observe: Observe) -> None:
        def on_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            observe(inputs[0].detach())

        def on_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            observe(output.detach())

        if site.side == "input":
            handles.append(site.module.register_forward_pre_hook(on_input))
        else:
            handles.append(site.module.register_forward_hook(on_output))

    try:
        yield hook
    finally:
        for handle in handles:
            handle.remove()


def _forward(model: PreTrainedModel, forward_loop: ForwardLoop) -> None:
    training = model.training
    model.train(False)
    with torch.no_grad():
        forward_loop(model)
    model.train(training)


def _add_channels(
    totals: list[Tensor], index: int, importance: Importance, state_BLC: Tensor
) -> None:
    contribution_C = importance.contribution(state_BLC).cpu()
    if index == len(totals):
        totals.append(contribution_C)
    else:
        totals[index] = totals[index] + contribution_C


def _record_residual(
    model: PreTrainedModel,
    architecture: Architecture,
    recording: Recording,
    layers: Layers | None,
    hook: Hook,
) -> None:
    """Watch what enters each layer's first norm and the final one: the residual stream."""
    depth = len(architecture.layers(model))
    stream: list[Tensor] = []  # of the present batch: the input of every layer so far

    def observe(index: int, state_BLH: Tensor) -> None:
        if index == 0:
            stream.clear()
        stream.append(state_BLH)
        if index == depth:
            recording.tokens += state_BLH.shape[0] * state_BLH.shape[1]
            _add_layers(recording, layers, stream, depth)
            stream.clear()

    firsts = [architecture.norms(layer)[0] for layer in architecture.layers(model)]
    for index, norm in enumerate([*firsts, architecture.final_norm(model)]):
        hook(Site(norm, "input"), partial(observe, index))


def _add_layers(
    recording: Recording, layers: Layers | None, stream: list[Tensor], depth: int
) -> None:
    block = BlockInfluence()
    influence = recording.influence or [0.0] * depth
    news = [float(block.contribution(*pair)) for pair in pairwise(stream)]
    recording.influence = [old + new for old, new in zip(influence, news, strict=True)]
    if layers is None:
        return
    runs = zip(stream, stream[layers.run_length :], strict=False)
    totals = [layers.importance.contribution(before, after).cpu() for before, after in runs]
    old_totals = recording.runs or [torch.zeros_like(total) for total in totals]
    recording.runs = [old + new for old, new in zip(old_totals, totals, strict=True)]


def _record_gram(
    model: PreTrainedModel,
    architecture: Architecture,
    recording: Recording,
    layers: Sequence[int],
    hook: Hook,
) -> None:
    def observe(layer: int, state_BLC: Tensor) -> None:
        state_TC = state_BLC.flatten(0, 1).float()
        gram_CC = recording.gram.get(layer)
        if gram_CC is None:
            recording.gram[layer] = state_TC.T @ state_TC
        else:
            gram_CC.addmm_(state_TC.T, state_TC)

    modules = architecture.layers(model)
    for layer in layers:
        down = architecture.mlp(modules[layer]).down
        hook(Site(down, "input"), partial(observe, layer))


def _check_finite(recording: Recording) -> None:
    for kind, totals in recording.channels.items():
        for index, total in enumerate(totals):
            _refuse(total, f"site {index} of axis {kind!r}")
    for index, influence in enumerate(recording.influence):
        _refuse(torch.tensor(influence), f"layer {index}")
    for layer, total in recording.gram.items():
        _refuse(total, f"the MLP of layer {layer}")


def _refuse(total: Tensor, where: str) -> None:
    if not bool(torch.isfinite(total).all()):
        raise ModelError(
            f"activations at {where} are not finite",
            hint="the checkpoint is damaged, or its weights overflow in this dtype",
        )
