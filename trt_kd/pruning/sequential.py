r"""Refit layer after layer on what the pruned layers before it make of the text.

A refit on the unpruned model's activations does not know the errors of the layers before. Here two
residual streams run side by side, the original one and the pruned one. Every projection is refitted
on the pruned stream, and a down projection that adds to the stream also makes up for what has gone
wrong so far: its goal is the original stream where the next kept layer begins, layers that were
dropped between them included (ReplaceMe, arXiv:2505.02819, folds a dropped run so). Tokens count by
the inverse square of their norm in the original stream, since the next norm divides by it:
otherwise a few tokens with massive activations would decide every fit.

Shapes: B sequences, L tokens, H hidden, C inputs of a projection.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trt_kd.architectures.base import Architecture
from trt_kd.errors import ModelError
from trt_kd.pruning.ridge import Gram, Refit, refit

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

    Raises:
        ModelError: if nothing was run.
    """
    batches: list[Batch] = []

    def watch(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            rest = {name: value for name, value in named.items() if name != "hidden_states"}
            rest |= {name: None for name in ("past_key_value", "past_key_values") if name in rest}
            if index == 0:
                state = arguments[0] if arguments else named["hidden_states"]
                batches.append(Batch(state.detach().clone(), []))
            batches[-1].calls.append((arguments[1:], rest))

        return hook

    layers = architecture.layers(model)
    handles = [
        layer.register_forward_pre_hook(watch(index), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    try:
        with torch.no_grad():
            forward_loop(model)
    finally:
        for handle in handles:
            handle.remove()
    if not batches:
        raise ModelError("the forward loop ran no batch", hint="give it calibration text")
    return batches


class Streams:
    """The original and the pruned residual stream of all batches, at the same layer."""

    def __init__(self, layers: nn.ModuleList, batches: Sequence[Batch]) -> None:
        """Start both with what enters the first layer."""
        self._layers, self._batches = layers, batches
        self.original = [batch.state for batch in batches]
        self.pruned = list(self.original)

    def through(self, index: int, states: Sequence[Tensor]) -> list[Tensor]:
        """``states`` of all batches after layer ``index`` as it stands now."""
        return [self._run(index, number, state) for number, state in enumerate(states)]

    def watched(self, index: int, consumer: nn.Linear) -> "list[tuple[Tensor, Tensor]]":
        """Of the pruned stream: inputs of ``consumer`` and the layer's output, by batch."""
        seen: list[Tensor] = []
        handle = consumer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            outputs = self.through(index, self.pruned)
        finally:
            handle.remove()
        return list(zip(seen, outputs, strict=True))

    def _run(self, index: int, number: int, state_BLH: Tensor) -> Tensor:
        arguments, named = self._batches[number].calls[index]
        with torch.no_grad():
            output = self._layers[index](state_BLH, *arguments, **named)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


def fold_points(
    layers: nn.ModuleList, architecture: Architecture, kept_layers: Sequence[int]
) -> list[nn.Linear]:
    """Down projections of the kept layers that have dropped ones behind them."""
    following = [*kept_layers[1:], len(layers)]
    found = []
    for index, end in zip(kept_layers, following, strict=True):
        mlp = architecture.mlp(layers[index])
        if end > index + 1 and mlp is not None and architecture.adds_to_residual():
            found.append(mlp.down)
    return found


def refit_sequentially(
    model: PreTrainedModel,
    architecture: Architecture,
    batches: Sequence[Batch],
    keep: Mapping[nn.Linear, Tensor],
    kept_layers: Sequence[int],
    ridges: Sequence[float],
) -> dict[nn.Linear, Refit]:
    """Refit the projections in ``keep`` to the inputs that they keep, first layer to last.

    Solutions are written into the model at once, with zeros at the inputs that will be cut.
    """
    from tqdm import tqdm

    layers = architecture.layers(model)
    streams = Streams(layers, batches)
    for index in range(kept_layers[0]):
        streams.original = streams.through(index, streams.original)
    refits: dict[nn.Linear, Refit] = {}
    following = [*kept_layers[1:], len(layers)]
    pairs = list(zip(kept_layers, following, strict=True))
    for index, end in tqdm(pairs, desc="refitting", disable=None):
        for number in range(index, end):
            streams.original = streams.through(number, streams.original)
        mlp = architecture.mlp(layers[index])
        inside = [each for each in layers[index].modules() if isinstance(each, nn.Linear)]
        for consumer in (each for each in inside if each in keep):
            last = mlp is not None and consumer is mlp.down and architecture.adds_to_residual()
            gram = _moments(streams, index, consumer, with_errors=last)
            feedbacks = FEEDBACKS if last else (0.0,)
            found = refit(consumer.weight, gram, keep[consumer], ridges, feedbacks)
            _write(consumer, found.weight, keep[consumer])
            refits[consumer] = found
        streams.pruned = streams.through(index, streams.pruned)
    return refits


def _moments(streams: Streams, index: int, consumer: nn.Linear, *, with_errors: bool) -> Gram:
    gram = Gram()
    for goal_BLH, (inputs_BLC, output_BLH) in zip(
        streams.original, streams.watched(index, consumer), strict=True
    ):
        norm_BL1 = goal_BLH.float().square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-6)
        errors = (goal_BLH.float() - output_BLH.float()) / norm_BL1 if with_errors else None
        gram.add(inputs_BLC.float() / norm_BL1, errors)
    return gram


def _write(consumer: nn.Linear, weight_HK: Tensor, keep_K: Tensor) -> None:
    with torch.no_grad():
        consumer.weight.zero_()
        consumer.weight[:, keep_K] = weight_HK.to(consumer.weight)
