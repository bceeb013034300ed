r"""Refit layer after layer on what the pruned layers before it make of the text.

A refit on the unpruned model's activations does not know the errors of the layers before. Here two
residual streams run side by side, the original one and the pruned one. Every projection is refitted
on the pruned stream, and a down projection that adds to the stream also makes up for what has gone
wrong so far. Before dropped layers its goal is the original stream behind them (ReplaceMe,
arXiv:2505.02819, folds a dropped run so) if that proves itself, see ``folding.py``. Tokens count by
the inverse square of their norm in the original stream, since the next norm divides by it:
otherwise a few tokens with massive activations would decide every fit.

Shapes: B sequences, L tokens, H hidden, C inputs of a projection.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from trt_kd.architectures.base import Architecture
from trt_kd.architectures.hooks import STATE, evaluating, hooks
from trt_kd.errors import ModelError
from trt_kd.measuring.progress import progress
from trt_kd.pruning.folding import Proof, samples
from trt_kd.pruning.reconstruction import SHARES, Reconstruct
from trt_kd.pruning.ridge import PLAIN, Refit, refit, solve

FEEDBACKS = (0.0, 0.3, 1.0)
"""Shares of the stream's error to make up for that are tried."""


@dataclass
class Batch:
    """One batch on its way through the layers."""

    state: Tensor
    """Input of the first layer, ``[B, L, H]``."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    """By layer: the arguments behind the state."""


def capture(
    model: PreTrainedModel, architecture: Architecture, forward_loop: Callable[[nn.Module], None]
) -> list[Batch]:
    """Run ``forward_loop`` and keep what enters the first layer and how every layer is called.

    Only the first batch is run in earnest: what layers are called with, besides the state, does
    not hang on what they make.

    Raises:
        ModelError: if nothing was run.
    """
    batches: list[Batch] = []
    layers = architecture.layers(model)
    with hooks() as hook, evaluating(model), torch.no_grad(), _idle_after_one(layers):
        for index, layer in enumerate(layers):
            hook.call(layer, partial(_note, batches, index))
        forward_loop(model)
    if not batches:
        raise ModelError("the forward loop ran no batch", hint="give it calibration text")
    return batches


@contextmanager
def _idle_after_one(layers: nn.ModuleList) -> Iterator[None]:
    """Have every layer work once and then hand on what it is given, in the form of its output."""
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        vars(layer)["forward"] = _Once(layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del vars(layer)["forward"]
            if forward is not None:
                vars(layer)["forward"] = forward


class _Once:
    """A forward function that works once."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward
        self._packs: bool | None = None

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self._packs is None:
            output = self._forward(*arguments, **named)
            self._packs = isinstance(output, tuple)
            return output
        state = arguments[0] if arguments else named[STATE]
        return (state,) if self._packs else state


def _note(
    batches: list[Batch], index: int, state: Tensor, rest: tuple[Any, ...], named: dict[str, Any]
) -> None:
    if index == 0:
        batches.append(Batch(state.detach().clone(), []))
    uncached = {name: None for name in ("past_key_value", "past_key_values") if name in named}
    batches[-1].calls.append((rest, named | uncached))


class _SeenError(Exception):
    """Ends a run of a layer where all that is wanted has passed."""


class Streams:
    """The original and the pruned residual stream of all batches, at the same layer."""

    def __init__(self, layers: nn.ModuleList, batches: Sequence[Batch]) -> None:
        """Start both with what enters the first layer."""
        self._layers, self._batches = layers, batches
        self.original = [batch.state for batch in batches]
        self.pruned = list(self.original)

    def through(self, index: int, states: Sequence[Tensor]) -> list[Tensor]:
        """``states`` of all batches after layer ``index`` as it stands now."""
        return [self.run(index, number, state) for number, state in enumerate(states)]

    def entering(self, index: int, consumer: nn.Linear) -> list[Tensor]:
        """Inputs of ``consumer`` by batch, from the pruned stream; what comes behind is not run."""
        seen: list[Tensor] = []

        def observe(state: Tensor) -> None:
            seen.append(state)
            raise _SeenError

        with hooks() as hook:
            hook(consumer, "input", observe)
            for number, state in enumerate(self.pruned):
                with suppress(_SeenError):
                    self.run(index, number, state)
        return seen

    def advance(self, index: int, adder: nn.Linear) -> list[Tensor]:
        """Move the pruned stream behind layer ``index``; return the inputs of ``adder``."""
        seen: list[Tensor] = []
        with hooks() as hook:
            hook(adder, "input", seen.append)
            self.pruned = self.through(index, self.pruned)
        return seen

    def add(self, inputs: Sequence[Tensor], change_HC: Tensor) -> None:
        """Add to the pruned stream what a change of the projection that ends a layer makes."""
        self.pruned = [
            state + functional.linear(inputs_BLC, change_HC)
            for state, inputs_BLC in zip(self.pruned, inputs, strict=True)
        ]

    def run(self, index: int, number: int, state_BLH: Tensor) -> Tensor:
        """The state of batch ``number`` after layer ``index`` as it stands now."""
        arguments, named = self._batches[number].calls[index]
        with evaluating(self._layers[index]), torch.no_grad():
            output = self._layers[index](state_BLH, *arguments, **named)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


def spans(kept_layers: Sequence[int], depth: int) -> list[tuple[int, int]]:
    """Every kept layer with the next kept one, or the end: what it has to stand for."""
    return list(zip(kept_layers, [*kept_layers[1:], depth], strict=True))


def fold_points(
    layers: nn.ModuleList, architecture: Architecture, kept: Sequence[tuple[int, int]]
) -> list[nn.Linear]:
    """Down projections of the layers ``kept``, see ``spans``, that have dropped ones behind."""
    found = []
    for index, end in kept:
        mlp = architecture.mlp(layers[index])
        if end > index + 1 and mlp is not None and architecture.adds_to_residual():
            found.append(mlp.down)
    return found


def refit_sequentially(
    model: PreTrainedModel,
    architecture: Architecture,
    batches: Sequence[Batch],
    keep: Mapping[nn.Linear, Tensor],
    kept: Sequence[tuple[int, int]],
    reconstruct: Reconstruct,
) -> dict[nn.Linear, Refit]:
    """Refit the projections in ``keep`` to the inputs that they keep, first layer to last.

    ``kept`` are the layers that stay, see ``spans``. Solutions are written into the model at once,
    with zeros at the inputs that will be cut.
    """
    layers = architecture.layers(model)
    streams = Streams(layers, batches)
    for index in range(kept[0][0]):
        streams.original = streams.through(index, streams.original)
    subject = _Subject(streams, Proof(model, architecture, streams), keep, reconstruct)
    refits: dict[nn.Linear, Refit] = {}
    for index, end in progress(_needed(layers, kept, keep), "refitting"):
        near = streams.original = streams.through(index, streams.original)
        for number in range(index + 1, end):
            streams.original = streams.through(number, streams.original)
        mlp = architecture.mlp(layers[index])
        adder = mlp.down if mlp is not None and architecture.adds_to_residual() else None
        inside = [each for each in layers[index].modules() if isinstance(each, nn.Linear)]
        for consumer in (each for each in inside if each in keep and each is not adder):
            refits[consumer] = subject.refit_inside(consumer, index, near)
        if adder is not None and adder in keep:
            refits[adder] = subject.refit_adder(adder, (index, end), near)
        else:
            streams.pruned = streams.through(index, streams.pruned)
    return refits


def _needed(
    layers: nn.ModuleList, kept: Sequence[tuple[int, int]], keep: Mapping[nn.Linear, Tensor]
) -> Sequence[tuple[int, int]]:
    """``kept`` up to the last layer with a projection to refit."""
    wanted = [any(each in keep for each in layers[index].modules()) for index, _ in kept]
    return kept[: len(kept) - wanted[::-1].index(True)] if any(wanted) else []


@dataclass
class _Subject:
    """What all refits share."""

    streams: Streams
    proof: Proof
    keep: Mapping[nn.Linear, Tensor]
    reconstruct: Reconstruct

    def refit_inside(self, consumer: nn.Linear, index: int, near: Sequence[Tensor]) -> Refit:
        """Refit a projection of layer ``index`` on what the pruned stream brings it."""
        gram = self.reconstruct.gram()
        inputs = self.streams.entering(index, consumer)
        for goal_BLH, inputs_BLC in zip(near, inputs, strict=True):
            gram.add(inputs_BLC.float() / _norm(goal_BLH))
        keep_K = self.keep[consumer]
        found = refit(consumer.weight, gram, keep_K, self.reconstruct.ridges)
        _write(consumer, _whole(consumer.weight, keep_K, found.weight))
        return found

    def refit_adder(self, adder: nn.Linear, span: tuple[int, int], near: Sequence[Tensor]) -> Refit:
        """Refit the projection that ends a layer, and move the pruned stream behind it."""
        index, end = span
        inputs = self.streams.advance(index, adder)
        before_HC, keep_K = adder.weight.detach().clone(), self.keep[adder]
        if end == index + 1:
            found = self._refit_to(near, inputs, before_HC, keep_K)
        elif len(keep_K) < adder.in_features:
            unfolded = self._refit_to(near, inputs, before_HC, keep_K)
            found = self._fold(end, inputs, before_HC, keep_K, unfolded)
        else:
            found = self._fold(end, inputs, before_HC, keep_K, None)
        _write(adder, _whole(before_HC, keep_K, found.weight))
        self.streams.add(inputs, adder.weight.detach() - before_HC)
        return found

    def _refit_to(
        self,
        near: Sequence[Tensor],
        inputs: Sequence[Tensor],
        before_HC: Tensor,
        keep_K: Tensor,
    ) -> Refit:
        """The fit to the original stream behind the layer itself."""
        gram = self.reconstruct.gram()
        for goal_BLH, pruned_BLH, inputs_BLC in zip(near, self.streams.pruned, inputs, strict=True):
            norm_BL1 = _norm(goal_BLH)
            errors_BLH = (goal_BLH.float() - pruned_BLH.float()) / norm_BL1
            gram.add(inputs_BLC.float() / norm_BL1, errors_BLH)
        return refit(before_HC, gram, keep_K, self.reconstruct.ridges, FEEDBACKS)

    def _fold(
        self,
        end: int,
        inputs: Sequence[Tensor],
        before_HC: Tensor,
        keep_K: Tensor,
        unfolded: Refit | None,
    ) -> Refit:
        """The fit to the original stream behind the gap, if that proves better than none.

        ``unfolded`` is the refit to inputs that are cut; None if all are kept.
        """
        gram = self.reconstruct.gram()
        lots = zip(self.streams.original, self.streams.pruned, inputs, self.proof.held, strict=True)
        for goal_BLH, pruned_BLH, inputs_BLC, held in lots:
            fit = slice(len(goal_BLH) - held)
            gram.add(*samples(goal_BLH[fit], pruned_BLH[fit], inputs_BLC[fit]))
        choices = [unfolded or solve(before_HC, gram.halves, keep_K, PLAIN)]
        if not any(self.proof.held):
            return choices[0]
        ridges = self.reconstruct.ridges
        choices += [refit(before_HC, gram, keep_K, ridges, (share,)) for share in SHARES]
        weights = [_whole(before_HC, keep_K, each.weight) for each in choices]
        return choices[self.proof.nearest(end, inputs, before_HC, weights)]


def _norm(states_BLH: Tensor) -> Tensor:
    """Root mean square of every token, ``[B, L, 1]``."""
    return states_BLH.float().square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-6)


def _whole(before_HC: Tensor, keep_K: Tensor, weight_HK: Tensor) -> Tensor:
    """A solution with zeros at the inputs that will be cut."""
    whole_HC = torch.zeros_like(before_HC)
    whole_HC[:, keep_K.to(before_HC.device)] = weight_HK.to(before_HC)
    return whole_HC


def _write(consumer: nn.Linear, weight_HC: Tensor) -> None:
    with torch.no_grad():
        consumer.weight.copy_(weight_HC)
