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
from trt_kd.pruning.base import Importance, Place, Recording, Site
from trt_kd.pruning.importance import BlockInfluence
from trt_kd.pruning.ridge import Gram

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
    channels: Mapping[str, tuple[Importance, Sequence[Place]]],
    layers: Layers | None,
    consumers: Sequence[nn.Linear],
) -> Recording:
    """Run ``forward_loop`` once and return what all axes need, summed batch by batch.

    ``channels`` names importance and places by kind of axis; of ``consumers`` the Gram matrices
    of the inputs are kept, two of ``4 * C * C`` bytes each.

    Raises:
        ModelError: if an activation is not finite, or nothing was run.
    """
    recording = Recording()
    with _hooks() as hook:
        for kind, (importance, places) in channels.items():
            totals: list[list[Tensor]] = recording.channels.setdefault(kind, [])
            for place in places:
                totals.append([])
                for site in place.sites:
                    hook(site, partial(_add_channels, totals[-1], len(totals[-1]), importance))
                    totals[-1].append(torch.zeros(()))
        _record_residual(model, architecture, recording, layers, hook)
        _record_gram(recording, consumers, hook)
        _forward(model, forward_loop)
    if recording.tokens == 0:
        raise ModelError("the forward loop ran no batch", hint="give it calibration text")
    recording.influence = [total / recording.tokens for total in recording.influence]
    _check_finite(recording)
    return recording


def record_gram(
    model: PreTrainedModel, forward_loop: ForwardLoop, consumers: Sequence[nn.Linear]
) -> dict[nn.Module, Gram]:
    """Gram matrices of the inputs of ``consumers``, in one more pass."""
    recording = Recording()
    with _hooks() as hook:
        _record_gram(recording, consumers, hook)
        _forward(model, forward_loop)
    _check_finite(recording)
    return recording.gram


Observe = Callable[[Tensor], None]
Hook = Callable[[Site, Observe], None]


@contextmanager
def _hooks() -> Iterator[Hook]:
    handles = []

    def hook(site: Site, observe: Observe) -> None:
        def on_input(
            module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]
        ) -> None:
            observe(inputs[0].detach() if inputs else named["hidden_states"].detach())

        def on_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            observe(output.detach())

        if site.side == "input":
            handle = site.module.register_forward_pre_hook(on_input, with_kwargs=True)
        else:
            handle = site.module.register_forward_hook(on_output)
        handles.append(handle)

    def read(site: Site, observe: Observe) -> None:
        hook(site, lambda state: observe(states(site, state)))

    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


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
    training = model.training
    model.train(False)
    with torch.no_grad():
        forward_loop(model)
    model.train(training)


def _add_channels(
    totals: list[Tensor], index: int, importance: Importance, state_BLC: Tensor
) -> None:
    totals[index] = totals[index] + importance.contribution(state_BLC).cpu()


def _record_residual(
    model: PreTrainedModel,
    architecture: Architecture,
    recording: Recording,
    layers: Layers | None,
    hook: Hook,
) -> None:
    """Watch what enters every layer and the final norm: the residual stream."""
    modules = architecture.layers(model)
    depth = len(modules)
    stream: list[Tensor] = []  # of the present batch: the input of every layer so far

    def observe(index: int, state_BLH: Tensor) -> None:
        if index == 0:
            stream.clear()
        stream.append(state_BLH)
        if index == depth:
            recording.tokens += state_BLH.shape[0] * state_BLH.shape[1]
            _add_layers(recording, layers, stream, depth)
            stream.clear()

    for index, module in enumerate([*modules, architecture.final_norm(model)]):
        hook(Site(module, "input"), partial(observe, index))


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


def _record_gram(recording: Recording, consumers: Sequence[nn.Linear], hook: Hook) -> None:
    for consumer in consumers:
        gram = recording.gram[consumer] = Gram()
        hook(Site(consumer, "input"), gram.add)


def _check_finite(recording: Recording) -> None:
    for kind, places in recording.channels.items():
        for index, totals in enumerate(places):
            for total in totals:
                _refuse(total, f"place {index} of axis {kind!r}")
    for index, influence in enumerate(recording.influence):
        _refuse(torch.tensor(influence), f"layer {index}")
    for index, gram in enumerate(recording.gram.values()):
        _refuse(gram.sum, f"projection {index} to refit")


def _refuse(total: Tensor, where: str) -> None:
    if not bool(torch.isfinite(total).all()):
        raise ModelError(
            f"activations at {where} are not finite",
            hint="the checkpoint is damaged, or its weights overflow in this dtype",
        )
