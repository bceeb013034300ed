r"""Fold dropped layers into the projection before them, and only where that proves itself.

A fold is fitted to the stream behind the gap, and the mean over tokens does not see what matters
most: a handful of tokens with massive activations, on which every later attention leans
(arXiv:2402.17762). A fit that spoils those lowers the mean error and wrecks the model. So

- the fit holds on to such tokens: there the projection's own output is the goal, with weight;
- some sequences stay out of the fit. On them the unpruned rest of the model runs behind the fold
  and behind the plain cut, and the one whose next-token distributions are nearer to the unpruned
  model's stays.

Shapes: B sequences, L tokens, H hidden, C inputs of the projection, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from trt_kd.architectures.base import Architecture
from trt_kd.pruning.reconstruction import PROOF_ROWS, proof_sequences

if TYPE_CHECKING:
    from trt_kd.pruning.sequential import Streams

MASSIVE = 10.0
"""Medians above which a token's norm counts as massive."""


def held_out(sizes: Sequence[int]) -> list[int]:
    """How many of the last sequences of every batch stay out of the fit, by sizes of batches.

    None of fewer than three: two are needed to fit.
    """
    left = proof_sequences(sum(sizes))
    found = []
    for size in reversed(sizes):
        found.append(min(size, left))
        left -= found[-1]
    return found[::-1]


def samples(goal_BLH: Tensor, pruned_BLH: Tensor, inputs_BLC: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and errors of a fold, weighted token by token.

    A token counts by the inverse square of its norm in the original stream, since the next norm
    divides by it. A massive one has no error, and inputs ``MASSIVE`` times as large as usual.
    """
    goal_BLH, pruned_BLH, inputs_BLC = (each.float() for each in (goal_BLH, pruned_BLH, inputs_BLC))
    norm_BL1 = _size(goal_BLH)
    largest_BL1 = torch.maximum(norm_BL1, _size(pruned_BLH))
    massive_BL1 = largest_BL1 > MASSIVE * norm_BL1.median()
    weighted_BLC = inputs_BLC / norm_BL1
    size_BL1 = _size(weighted_BLC)
    anchored_BLC = weighted_BLC * (MASSIVE * size_BL1.median() / size_BL1)
    errors_BLH = ((goal_BLH - pruned_BLH) / norm_BL1).masked_fill(massive_BL1, 0.0)
    return torch.where(massive_BL1, anchored_BLC, weighted_BLC), errors_BLH


class Proof:
    """Tells which of several projections brings the model nearest to the unpruned one."""

    def __init__(
        self, model: PreTrainedModel, architecture: Architecture, streams: "Streams"
    ) -> None:
        """Layers of ``model`` behind those that ``streams`` have passed are still unpruned."""
        self._streams = streams
        self._depth = len(architecture.layers(model))
        self._norm, self._head = architecture.final_norm(model), architecture.head(model)
        self.held = held_out([len(state) for state in streams.original])
        """Sequences at the end of every batch that no fold may be fitted to."""

    def nearest(
        self,
        end: int,
        inputs: Sequence[Tensor],
        before_HC: Tensor,
        weights: Sequence[Tensor],
    ) -> int:
        """Number of the one of ``weights`` with the lowest KL divergence; the first of equals.

        Both streams stand before layer ``end``, the pruned one with the projection ``before_HC``
        on ``inputs``.
        """
        numbers = [number for number, held in enumerate(self.held) if held]
        streams = self._streams
        goals = self._ends(end, {number: streams.original[number] for number in numbers})
        best, lowest = 0, math.inf
        for index, weight_HC in enumerate(weights):
            change_HC = weight_HC - before_HC
            states = {
                number: streams.pruned[number] + functional.linear(inputs[number], change_HC)
                for number in numbers
            }
            nats = self._nats(goals, self._ends(end, states))
            if nats < lowest:
                best, lowest = index, nats
        return best

    def _ends(self, end: int, states: Mapping[int, Tensor]) -> list[Tensor]:
        """What leaves the last layer, ``[tokens, H]``, of the sequences held out."""
        found = []
        for number, start_BLH in states.items():
            state_BLH = start_BLH
            for index in range(end, self._depth):
                state_BLH = self._streams.run(index, number, state_BLH)
            found.append(state_BLH[-self.held[number] :].flatten(0, 1))
        return found

    def _nats(self, goals: Sequence[Tensor], found: Sequence[Tensor]) -> float:
        """KL divergence summed over tokens; infinite if it is not finite."""
        total = 0.0
        for goal_TH, found_TH in zip(goals, found, strict=True):
            for first in range(0, len(goal_TH), PROOF_ROWS):
                rows = slice(first, first + PROOF_ROWS)
                log_q_RV, log_p_RV = map(self._log_probabilities, (found_TH[rows], goal_TH[rows]))
                nats = functional.kl_div(log_q_RV, log_p_RV, reduction="sum", log_target=True)
                total += float(nats)
        return total if math.isfinite(total) else math.inf

    def _log_probabilities(self, states_RH: Tensor) -> Tensor:
        with torch.no_grad():
            logits_RV: Tensor = self._head(self._norm(states_RH))
        return logits_RV.float().log_softmax(-1)


def _size(states_BLC: Tensor) -> Tensor:
    """Root mean square of every token, ``[B, L, 1]``; never zero."""
    return states_BLC.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-6)
