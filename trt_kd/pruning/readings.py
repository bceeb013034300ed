r"""What is refit: weights, what they read of the model, and how to solve for them.

A reader of cut units keeps the columns of those that stay, and ``ridge.py`` solves for them:

- down and output projections lose some of their inputs;
- what reads the residual stream loses channels, and sees the rest through a norm that divides by
  the kept channels alone. With y ``[T, N]`` what the norm made before and z ``[T, K]`` what it
  makes of the kept channels, the old output is
  :math:`W y = W_K z + W_D y_D + W_K (y_K - z)`: a projection of the inputs z, y_D and y_K - z that
  keeps the first ones, so that the same regression is exact;
- an expert's down projection sees the tokens that the router sends there, weighted by the router.

Shapes: B sequences, L tokens, T both, C inputs, H outputs, N channels of the stream, K kept.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trt_kd.architectures.base import (
    Architecture,
    Experts,
    Readers,
    Slice,
    columns,
    norm_slices,
)
from trt_kd.architectures.hooks import Hook
from trt_kd.pruning.experts import mixtures
from trt_kd.pruning.reconstruction import in_order
from trt_kd.pruning.ridge import Gram, Refit, refit
from trt_kd.pruning.slicing import cut

STEPS = ("qkv_proj", "o_proj", "gate_up_proj", "experts", "down_proj", "lm_head")
"""What is refit, as it runs in a layer; the head runs behind the last one."""
Found = list[tuple[str, Refit]]
"""Refits by the name of the projection; their weights stand in the model and nowhere else."""


class Reading(ABC):
    """Weights that read the same inputs, with the Gram matrices of those."""

    count = 1
    """How many Gram matrices."""

    def __init__(self, layer: int, step: int, width: int) -> None:
        """``step`` is its turn in the layer, ``width`` the side of a square as large as all."""
        self.layer, self.step, self.width = layer, step, width
        self.grams: list[Gram] = []

    @property
    def always(self) -> bool:
        """Whether it stays even if its layer goes: the head, behind the last one."""
        return STEPS[self.step] == "lm_head"

    def start(self, gram: Callable[[], Gram]) -> None:
        """Begin with matrices that have seen nothing, made by ``gram``."""
        self.grams = [gram() for _ in range(self.count)]

    @abstractmethod
    def watch(self, hook: Hook) -> None:
        """Have the matrices filled with what enters."""

    @abstractmethod
    def solve(self, keep: Mapping[nn.Linear, Tensor], ridges: Sequence[float]) -> Found:
        """Refit, write the solutions into the columns that stay, and forget the matrices.

        ``keep`` are the inputs that projections keep.
        """


class LinearReading(Reading):
    """A projection whose inputs are the units of an axis."""

    def __init__(self, linear: nn.Linear, layer: int, name: str) -> None:
        super().__init__(layer, STEPS.index(name), linear.in_features)
        self.linear, self.name = linear, name

    def watch(self, hook: Hook) -> None:
        """See the base class."""
        hook(self.linear, "input", partial(_add, self.grams[0]))

    def solve(self, keep: Mapping[nn.Linear, Tensor], ridges: Sequence[float]) -> Found:
        """See the base class."""
        weight_HC, keep_K = self.linear.weight.detach(), keep[self.linear]
        found = refit(weight_HC, self.grams.pop(), keep_K, ridges)
        return [(self.name, _written(weight_HC, keep_K, found))]


class StreamReading(Reading):
    """Projections that read channels of the residual stream, through a norm or as they are."""

    def __init__(
        self, readers: Readers, layer: int, keep_K: Tensor, architecture: Architecture
    ) -> None:
        first = _parameter(next(iter(readers.weights.values()))[0])
        hidden = first.shape[-1]
        extra = 0 if readers.norm is None else len(keep_K)
        super().__init__(layer, STEPS.index(next(iter(readers.weights))), hidden + extra)
        self.readers, self.keep_K = readers, keep_K.to(first.device)
        dropped_N = torch.ones(hidden, dtype=torch.bool, device=self.keep_K.device)
        dropped_N[self.keep_K] = False
        self.drop_D = dropped_N.nonzero().flatten()
        self.pruned_norm: nn.Module | None = None
        if readers.norm is not None:
            self.pruned_norm = copy.deepcopy(readers.norm)
            cut(norm_slices(self.pruned_norm), keep_K, norm_offset=architecture.norm_offset)

    def watch(self, hook: Hook) -> None:
        """See the base class."""
        seen = self.readers.norm if self.readers.norm is not None else self.readers.block
        hook(seen, "input", self._observe)

    def _observe(self, state_BLN: Tensor) -> None:
        keep_K, drop_D = self.keep_K.to(state_BLN.device), self.drop_D.to(state_BLN.device)
        state_BLN = state_BLN.detach()
        kept_BLK = state_BLN[..., keep_K]
        if self.readers.norm is None or self.pruned_norm is None:
            self.grams[0].add(torch.cat([kept_BLK, state_BLN[..., drop_D]], dim=-1))
            return
        made_BLN = self.readers.norm.forward(state_BLN)  # past its hooks
        pruned_BLK = self.pruned_norm(kept_BLK)
        parts = [pruned_BLK, made_BLN[..., drop_D], made_BLN[..., keep_K] - pruned_BLK]
        self.grams[0].add(torch.cat(parts, dim=-1))

    def solve(self, keep: Mapping[nn.Linear, Tensor], ridges: Sequence[float]) -> Found:
        """See the base class."""
        gram = self.grams.pop()
        return [
            (name, self._refit(entries, gram, ridges))
            for name, entries in self.readers.weights.items()
        ]

    def _refit(self, entries: Sequence[Slice], gram: Gram, ridges: Sequence[float]) -> Refit:
        """One ridge for all ``entries``; their outputs stand in one matrix meanwhile."""
        weights = [_parameter(entry).detach().flatten(0, -2) for entry in entries]
        parts = [self.keep_K, self.drop_D]
        if self.pruned_norm is not None:
            parts.append(self.keep_K)
        device = weights[0].device
        whole_HC = torch.cat([weight.to(device) for weight in weights])[:, torch.cat(parts)]
        found = refit(whole_HC, gram, torch.arange(len(self.keep_K)), ridges)
        first = 0
        for weight_HN in weights:
            rows = slice(first, first + len(weight_HN))
            _written(weight_HN, self.keep_K, found._replace(weight=found.weight[rows]))
            first = rows.stop
        return found._replace(weight=found.weight.new_empty(0))


class ExpertsReading(Reading):
    """The down projections of all experts of one mixture."""

    def __init__(self, experts: Experts, layer: int, keep_EK: Tensor) -> None:
        width = math.ceil(experts.count**0.5 * experts.width)
        super().__init__(layer, STEPS.index("experts"), width)
        self.count, self.experts, self.keep_EK = experts.count, experts, keep_EK

    def watch(self, hook: Hook) -> None:
        """See the base class."""
        hook(self.experts.module, "input", self._observe)

    def _observe(self, state_BLN: Tensor) -> None:
        batch, length, hidden = state_BLN.shape
        visits = self.experts.visits(state_BLN.detach().reshape(-1, hidden))
        for gram, (tokens_S, weights_S, channels_SC) in zip(self.grams, visits, strict=True):
            weighted_SC = channels_SC * weights_S.unsqueeze(1).to(channels_SC)
            gram.add_some(weighted_SC, tokens_S // length, batch)

    def solve(self, keep: Mapping[nn.Linear, Tensor], ridges: Sequence[float]) -> Found:
        """See the base class."""
        found = []
        for expert, keep_K in enumerate(self.keep_EK):
            weight_HC = self.experts.down(expert)
            solution = refit(weight_HC, self.grams[expert], keep_K, ridges)
            found.append((f"experts.{expert}.down_proj", _written(weight_HC, keep_K, solution)))
        self.grams.clear()
        return found


def linear_readings(
    model: PreTrainedModel, architecture: Architecture, consumers: Iterable[nn.Linear]
) -> list[LinearReading]:
    """Readings of down and output projections, as they run."""
    layers = architecture.layers(model)
    found = in_order(layers, consumers)
    outputs = {architecture.attention(layers[layer]).o for layer in set(found.values())}
    return [
        LinearReading(each, layer, "o_proj" if each in outputs else "down_proj")
        for each, layer in found.items()
    ]


def stream_readings(
    model: PreTrainedModel, architecture: Architecture, keep_K: Tensor
) -> list[StreamReading]:
    """Readings of all that reads the residual stream; a head that is the embedding is none."""
    layers = architecture.layers(model)
    found = [
        StreamReading(readers, layer, keep_K, architecture)
        for layer, module in enumerate(layers)
        for readers in architecture.readers(module)
    ]
    head, embedding = architecture.head(model), architecture.embedding(model)
    if head.weight is not embedding.weight:
        weights = {"lm_head": (columns(head, head.in_features),)}
        readers = Readers(head, architecture.final_norm(model), weights)
        found.append(StreamReading(readers, len(layers) - 1, keep_K, architecture))
    return found


def expert_readings(
    model: PreTrainedModel, architecture: Architecture, keep: Sequence[Tensor]
) -> list[ExpertsReading]:
    """Readings of all mixtures; ``keep`` counts channels through a whole mixture."""
    return [
        ExpertsReading(experts, layer, keep_N.view(experts.count, -1) % experts.width)
        for (layer, experts), keep_N in zip(mixtures(model, architecture), keep, strict=True)
    ]


def solve_group(
    readings: Iterable[Reading],
    keep: Mapping[nn.Linear, Tensor],
    ridges: Sequence[float],
    tell: Callable[[], object],
) -> dict[Reading, Found]:
    """Refit what ``readings`` have seen, in the model; ``tell`` is called after every one."""
    found = {}
    for reading in readings:
        found[reading] = reading.solve(keep, ridges)
        tell()
    return found


def _parameter(entry: Slice) -> Tensor:
    return entry.module.get_parameter(entry.name)


def _add(gram: Gram, state_BLC: Tensor) -> None:
    gram.add(state_BLC.detach())


def _written(weight_HC: Tensor, keep_K: Tensor, found: Refit) -> Refit:
    """Put a solution into the columns that stay, so that any order of cuts works."""
    with torch.no_grad():
        weight_HC[:, keep_K.to(weight_HC.device)] = found.weight.to(weight_HC)
    return found._replace(weight=found.weight.new_empty(0))
