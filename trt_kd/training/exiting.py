"""Losses of a student's exits in one micro-batch.

Shape suffixes: B sequences, L positions, K positions that predict, T valid tokens, D hidden size.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trt_kd.architectures import architecture_of
from trt_kd.training.exits import Exits
from trt_kd.training.feature_terms import Part
from trt_kd.training.head import Head, Labels, Objective, head_loss, linear_head
from trt_kd.training.reading import Seen


def exit_parts(
    exits: Exits,
    student: PreTrainedModel,
    states: tuple[Seen, Tensor],
    mask_BK: Tensor,
    *,
    weight: float,
    dtype: torch.dtype,
) -> dict[str, Part]:
    """Every exit's sum over valid tokens, in nats, with its weight, by its name in the log.

    Args:
        exits: which layers, and the loss.
        student: whose final norm and head an exit goes through.
        states: those of these layers in the pass, and the last hidden states ``[B, L, D]``, behind
            the norm.
        mask_BK: valid tokens.
        weight: of every exit at this step.
        dtype: of the head's products.
    """
    seen, hidden_BLD = states
    norm = architecture_of(student.config.model_type).final_norm(student)
    head = linear_head(student)
    said = _said(head.cast(dtype), hidden_BLD[:, :-1][mask_BK].detach())
    labels = Labels(torch.zeros(int(mask_BK.sum()), dtype=torch.long, device=mask_BK.device))
    objective, found = Objective(exits.loss, 0.0, 1.0), {}
    for layer in exits.layers:
        exit_TD = norm(seen[layer, "states"])[:, :-1][mask_BK]
        total, _, _ = head_loss(objective, exit_TD, head, labels, teacher=said, dtype=dtype)
        found[f"exit_{layer}_nats_per_token"] = Part(weight, total)
    return found


def _said(head: Head, hidden_TD: Tensor) -> Callable[[slice], Tensor]:
    """The model's own logits for a slice of the tokens."""
    return lambda rows: head.logits(hidden_TD[rows])
