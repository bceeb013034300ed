"""Search sizes for a model in memory: what ``mtp.prune`` does under limits with several open axes.

The text is what the forward loop feeds. Every fourth sequence of it is kept out of scores and
refits, and measures how far a cut moved the model. The prune stage does the same on files, with
text of its own for every purpose, and outlives a kill.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trt_kd.architectures import architecture_of
from trt_kd.architectures.hooks import evaluating
from trt_kd.architectures.shape import ModelShape, shape_from_config
from trt_kd.errors import ModelError
from trt_kd.measuring.progress import progress
from trt_kd.pruning.base import Axis
from trt_kd.pruning.budget import Budget
from trt_kd.pruning.candidates import possible
from trt_kd.pruning.catalogue import Target
from trt_kd.pruning.divergence import Reference
from trt_kd.pruning.engine import Request, shrink
from trt_kd.pruning.loss_passes import fed_tokens
from trt_kd.pruning.scoring import ForwardLoop
from trt_kd.pruning.search import Search, name_of, open_axes, ranked
from trt_kd.pruning.sensitivity import Point, sizes_to_measure
from trt_kd.pruning.sizes import settled

_EVERY = 4
"""One sequence in so many measures; the others calibrate."""

ScoreFunc = Callable[[nn.Module], float]
"""The user's own measure of a pruned model, the higher the better."""


@dataclass(frozen=True)
class _Bench:
    """Makes pruned copies of a model and measures them."""

    model: PreTrainedModel
    shape: ModelShape
    request: Request
    loop: ForwardLoop
    reference: Reference

    def cut(self, axes: Sequence[Axis]) -> PreTrainedModel:
        """A pruned copy."""
        pruned = copy.deepcopy(self.model)
        shrink(pruned, self.loop, replace(self.request, axes=axes), self.shape)
        return pruned

    def moved(self, pruned: PreTrainedModel) -> float:
        """Mean divergence from the unpruned model, in nats per token."""
        return float(self.reference.divergence(pruned).mean())


def search_sizes(
    model: PreTrainedModel,
    forward_loop: ForwardLoop,
    request: Request,
    budget: Budget,
    search: Search,
    score_func: ScoreFunc | None,
) -> tuple[list[Axis], dict[str, Any]]:
    """The axes of ``request`` with the sizes that do best within ``budget``, and a record.

    The ``top_k`` candidates of the prediction are made and measured: by ``score_func``, or by their
    divergence from ``model``. ``model`` stays as it is; a second one is held beside it.

    Raises:
        ModelError: if nothing fits, or the forward loop feeds fewer than two sequences.
    """
    shape = shape_from_config(model.config.to_dict())
    candidates = possible(request.axes, shape, budget, Target(), slack=search.slack)
    rows = _fed_rows(model, forward_loop)
    check = rows[::_EVERY]
    fit = [row for number, row in enumerate(rows) if number % _EVERY]
    bench = _Bench(model, shape, request, partial(_replay, fit), Reference(model, check))
    axes = open_axes(request.axes)
    points = [
        Point(axis.kind, size, axis.read(shape), bench.moved(bench.cut([axis.resized(size)])))
        for axis in progress(axes, "measuring cuts")
        for size in sizes_to_measure(axis, shape, 3)
    ]
    best = ranked(candidates, points, axes, search)[: search.top_k]
    measured = []
    for one in progress(best, "measuring candidates"):
        pruned = bench.cut(settled(request.axes, one.candidate.shape))
        row: dict[str, Any] = {
            "name": name_of(one.candidate.shape, axes),
            "sizes": one.candidate.changed,
            "parameters": one.candidate.parameters,
            "predicted_nats": one.predicted_nats,
            "divergence_nats": bench.moved(pruned),
        }
        measured.append(row | ({"score": float(score_func(pruned))} if score_func else {}))
    losses = [-row["score"] if score_func else row["divergence_nats"] for row in measured]
    winner = losses.index(min(losses))
    record = {"measured": measured, "winner": measured[winner]["name"]}
    return settled(request.axes, best[winner].candidate.shape), record


def _fed_rows(model: PreTrainedModel, forward_loop: ForwardLoop) -> list[Tensor]:
    """The sequences that the loop feeds, without padding, each ``[L]``."""
    body = architecture_of(model.config.model_type).body(model)
    with fed_tokens(body) as batches, evaluating(model), torch.no_grad():
        forward_loop(model)
    rows = [
        row.tokens[0] if row.mask is None else row.tokens[0][row.mask[0].bool()]
        for batch in batches
        for row in batch.rows()
    ]
    if len(rows) < _EVERY:
        raise ModelError(
            f"a search needs {_EVERY} sequences of calibration text, the forward loop fed "
            f"{len(rows)}",
            hint="let the loop pass input_ids of more text, or give every axis a size",
        )
    return rows


def _replay(rows: Sequence[Tensor], model: PreTrainedModel) -> None:
    body = architecture_of(model.config.model_type).body(model)
    for row_L in rows:
        body(input_ids=row_L[None], use_cache=False)
