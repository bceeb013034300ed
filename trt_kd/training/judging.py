"""What the policy gradient knows of every sampled token before its gradient is taken.

Shape suffixes: B sequences, K positions that predict, T valid tokens, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trt_kd.losses.maths import wide
from trt_kd.losses.policy import JudgedRows, importance, outlooks
from trt_kd.training.head import Head, pieces, rows_at_a_time
from trt_kd.training.on_policy import PolicyGradient

Rows = Callable[[slice], Any]
"""Gives the teacher's logits ``[T, V]`` for a slice of the valid tokens."""
GROUP_ROWS = 256
"""Tokens whose logits exist at a time."""


@torch.no_grad()
def judged(
    policy: PolicyGradient, student: Rows, teacher: Rows, labels_T: Tensor, mask_BK: Tensor
) -> tuple[Callable[[slice], JudgedRows], Tensor]:
    """The teacher's rows with the weight and the outlook of every token, and the weights ``[T]``.

    One pass through both heads; the one with the gradient comes after it, because what a token is
    worth depends on those that follow.

    Args:
        policy: which stabilisers are used.
        student: gives the student's logits for a slice of the valid tokens.
        teacher: gives the teacher's.
        labels_T: the sampled tokens, int64.
        mask_BK: where they stand.
    """
    log_q_T, log_p_T = log_probs_of(student, labels_T), log_probs_of(teacher, labels_T)
    gains_BK = torch.zeros(mask_BK.shape, dtype=log_q_T.dtype, device=log_q_T.device)
    gains_BK[mask_BK] = log_p_T - log_q_T
    outlooks_T = outlooks(
        gains_BK,
        mask_BK,
        own=not policy.single_step,
        length_normalised=policy.length_normalised,
    )[mask_BK]
    weights_T = importance(log_q_T, log_p_T, policy.teacher_mix)

    def rows(part: slice) -> JudgedRows:
        return JudgedRows(teacher(part), weights_T[part], outlooks_T[part], policy.single_step)

    return rows, weights_T


def log_probs_of(logits: Rows, labels_T: Tensor) -> Tensor:
    """Log-probability ``[T]`` of every token, at least float32, some logits at a time."""
    found = []
    for group in pieces(len(labels_T), GROUP_ROWS):
        logits_TV = logits(group)
        step = rows_at_a_time(logits_TV.shape[1], logits_TV.device)
        for rows in pieces(len(logits_TV), step):
            wide_TV = wide(logits_TV[rows])
            named_T = wide_TV.gather(-1, labels_T[group][rows].unsqueeze(-1))[:, 0]
            found.append(named_T - wide_TV.logsumexp(-1))
    return torch.cat(found) if found else torch.zeros(0, device=labels_T.device)


def logits_of(hidden_TD: Tensor, head: Head) -> Rows:
    """The logits of a slice of the tokens."""
    return lambda rows: head.logits(hidden_TD[rows])
