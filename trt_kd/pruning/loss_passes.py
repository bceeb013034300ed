"""Passes for importances that ask for the loss: gradients at the sites, losses without layers.

They run over the token ids that the forward loop fed, so that a loop which runs only the trunk
will do. Losses are next-token cross-entropy in nats.

Shapes: B sequences, L tokens, C channels, H hidden, V vocabulary.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from trt_kd.architectures.base import Architecture
from trt_kd.architectures.hooks import Hook, Observe, evaluating
from trt_kd.errors import ModelError
from trt_kd.measuring.progress import Steps, progress
from trt_kd.pruning.base import Importance, Place, Site

_IGNORED = -100


@dataclass
class Batch:
    """Token ids as the model got them."""

    tokens: Tensor
    """``[B, L]``."""
    mask: Tensor | None = None
    """Attention mask ``[B, L]``: padding is neither read nor predicted."""

    def rows(self) -> "list[Batch]":
        """Its sequences one by one."""
        numbers = range(len(self.tokens))
        masks = [None if self.mask is None else self.mask[n : n + 1] for n in numbers]
        return [Batch(self.tokens[n : n + 1], mask) for n, mask in zip(numbers, masks, strict=True)]


@contextmanager
def fed_tokens(body: nn.Module) -> Iterator[list[Batch]]:
    """Collect the token ids that the model without its head is run on, embeddings left out."""
    batches: list[Batch] = []

    def on_input(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        tokens_BL = inputs[0] if inputs else named.get("input_ids")
        if tokens_BL is not None:
            batches.append(Batch(tokens_BL.detach(), named.get("attention_mask")))

    handle = body.register_forward_pre_hook(on_input, with_kwargs=True)
    try:
        yield batches
    finally:
        handle.remove()


def next_token_loss(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, int]:
    """Sum ``[]`` over the tokens that have one before them, in nats, and how many they are.

    Raises:
        ModelError: if there is no such token.
    """
    labels_BL = batch.tokens[:, 1:]
    if batch.mask is not None:
        both_BL = batch.mask[:, 1:].bool() & batch.mask[:, :-1].bool()
        labels_BL = labels_BL.masked_fill(~both_BL, _IGNORED)
    count = int((labels_BL != _IGNORED).sum())
    if count == 0:
        raise ModelError(
            f"calibration blocks of shape {tuple(batch.tokens.shape)} hold no next token",
            hint="feed blocks of two tokens at least",
        )
    output = model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
    logits_TV = output.logits[:, :-1].flatten(0, 1)
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    labels_T = labels_BL.to(logits_TV.device).flatten()
    loss = cross_entropy(logits_TV, labels_T, ignore_index=_IGNORED, reduction="sum")
    return loss, count


def backward(model: PreTrainedModel, architecture: Architecture, batches: Sequence[Batch]) -> None:
    """Run the summed loss of every batch forward and backward, through activations only."""
    with _frozen(model, architecture), evaluating(model), torch.enable_grad():
        for batch in progress(batches, "gradients"):
            loss, _ = next_token_loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]


@contextmanager
def _frozen(model: PreTrainedModel, architecture: Architecture) -> Iterator[None]:
    """Let gradients flow to the embeddings' output and to no parameter."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def on_output(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.detach().requires_grad_()

    handle = architecture.embedding(model).register_forward_hook(on_output)
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)


def watch_channels(
    importance: Importance, places: Sequence[Place], totals: Sequence[list[Tensor]], hook: Hook
) -> None:
    """Add up contributions to ``totals``, by place and site, while ``backward`` runs."""
    for place, sums in zip(places, totals, strict=True):
        for index, site in enumerate(place.sites):
            _watch_site(site, partial(_add, importance, sums, index, site), hook)


def _watch_site(site: Site, add: Callable[[Tensor, Tensor], None], hook: Hook) -> None:
    entered: list[Tensor] = []

    def on_state(state: Tensor) -> None:
        _on_gradient(state, partial(add, state.detach()))

    def on_input(state: Tensor) -> None:
        entered.append(state.detach())

    def on_output(state: Tensor) -> None:
        _on_gradient(state, partial(add, entered.pop()))

    if site.pair is None:
        hook(site.module, site.side, on_state)
    else:
        hook(site.module, "input", on_input)
        hook(site.module, "output", on_output)


def _on_gradient(state: Tensor, observe: Observe) -> None:
    # What holds the tensor itself would make a cycle that keeps the whole graph.
    state.register_hook(observe)  # type: ignore[no-untyped-call]


def _add(
    importance: Importance,
    sums: list[Tensor],
    index: int,
    site: Site,
    state: Tensor,
    gradient: Tensor,
) -> None:
    pair = (state, gradient) if site.pair is None else site.pair(state, gradient)
    contribution_N = importance.contribution(*pair).reshape(-1, site.width).sum(dim=1)
    importance.accumulate(sums, index, contribution_N)


def no_totals(count: int) -> list[Tensor]:
    """Totals of runs of layers before the first batch, each ``[]`` in float64."""
    return [torch.zeros((), dtype=torch.float64) for _ in range(count)]


def watch_layers(
    importance: Importance, run_length: int, modules: Sequence[nn.Module], hook: Hook
) -> list[Tensor]:
    """Totals by first layer of a run, filled while ``backward`` runs.

    ``modules`` are the layers and the norm after them: what enters is the residual stream.
    """
    totals = no_totals(len(modules) - run_length)
    stream: list[Tensor] = []

    def observe(index: int, state_BLH: Tensor) -> None:
        if index == 0:
            stream.clear()
        stream.append(state_BLH.detach())
        if index >= run_length:
            _on_gradient(state_BLH, partial(add, stream[index - run_length], stream[index], index))

    def add(before_BLH: Tensor, after_BLH: Tensor, index: int, gradient_BLH: Tensor) -> None:
        first = index - run_length
        states = (before_BLH.to(after_BLH.device), after_BLH, gradient_BLH)
        importance.accumulate(totals, first, importance.contribution(*states))

    for index, module in enumerate(modules):
        hook(module, "input", partial(observe, index))
    return totals


def skipping_losses(
    model: PreTrainedModel,
    architecture: Architecture,
    batches: Sequence[Batch],
    importance: Importance,
    run_length: int,
) -> list[Tensor]:
    """By first layer of a run the contribution of the losses with and without that run.

    Layers before a run are not computed again: what they leave in the residual stream is kept for
    the one sequence at work.
    """
    modules = list(architecture.layers(model))
    firsts = range(len(modules) - run_length + 1)
    rows = _chosen(batches, importance.most_blocks())
    losses = torch.zeros(1 + len(firsts), dtype=torch.float64)
    tokens = 0
    with (
        torch.no_grad(),
        evaluating(model),
        Steps("skipping layers", len(rows) * len(firsts)) as steps,
    ):
        for row in rows:
            with _returns(modules) as returns:
                loss, count = next_token_loss(model, row)
            losses[0] += loss.cpu()
            tokens += count
            for first in firsts:
                with _skipped(modules[: first + run_length], returns[first]):
                    losses[1 + first] += next_token_loss(model, row)[0].cpu()
                steps.step()
    whole, *without = losses / tokens
    return [importance.contribution(whole, each) for each in without]


def _chosen(batches: Sequence[Batch], most: int | None) -> list[Batch]:
    """At most so many sequences, chosen by their own ids: the order they came in is no matter."""
    rows = [row for batch in batches for row in batch.rows()]
    return sorted(rows, key=lambda row: _digest(row.tokens))[:most]


def _digest(tokens: Tensor) -> bytes:
    return hashlib.sha256(tokens.cpu().contiguous().numpy().tobytes()).digest()


@contextmanager
def _returns(modules: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Collect what every layer would return if it were skipped: its input, in the form it uses."""
    returns: list[Any] = []

    def on_output(
        module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> None:
        state = inputs[0] if inputs else named["hidden_states"]
        rest = output[1:] if isinstance(output, tuple) else None
        returns.append(state if rest is None else (state, *rest))

    handles = [module.register_forward_hook(on_output, with_kwargs=True) for module in modules]
    try:
        yield returns
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _skipped(modules: Sequence[nn.Module], returned: Any) -> Iterator[None]:
    """Let ``modules``, all up to the end of a run, return at once what entered the run."""
    own = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = lambda *inputs, **named: returned
    try:
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            del module.forward
            if forward is not None:  # set by a library that moves inputs between devices
                module.forward = forward
