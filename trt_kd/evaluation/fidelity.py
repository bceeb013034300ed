"""How far a model is from its teacher, from logits alone.

Shape suffixes: B blocks, L positions of a block, V vocabulary, R rows of a chunk. The logits at
position t predict token t + 1, so a block of L tokens gives L - 1 predictions.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from torch.nn import functional as F

ROWS = 128


@dataclass(frozen=True)
class BlockScores:
    """Means over the predictions of each block, float64 ``[B]``."""

    kl_nats: np.ndarray
    """Kullback-Leibler divergence from the teacher, teacher first, in nats per token."""
    top1_agreement: np.ndarray
    """Share of predictions with the teacher's likeliest token."""
    loss_nats: np.ndarray
    """Cross-entropy against the text, in nats per token."""


def block_scores(
    model_BLV: np.ndarray, teacher_BLV: np.ndarray, tokens_BL: np.ndarray
) -> BlockScores:
    r"""Score blocks of text: :math:`D_{KL}(p \| q)`, top-1 agreement and loss.

    Shapes: model_BLV and teacher_BLV ``[B, L, V]`` finite logits, tokens_BL ``[B, L]`` ids with
    L > 1. Computed in float32 (float64 for float64 logits), a few rows at a time.

    Raises:
        ValueError: if the shapes differ or a block has fewer than two tokens.
    """
    blocks, length = tokens_BL.shape
    if model_BLV.shape != teacher_BLV.shape or model_BLV.shape[:2] != tokens_BL.shape:
        raise ValueError(
            f"logits {model_BLV.shape}, teacher's logits {teacher_BLV.shape} and tokens "
            f"{tokens_BL.shape} do not belong together"
        )
    if length < 2:
        raise ValueError("a block of one token predicts nothing")
    sums = torch.zeros(3, blocks, dtype=torch.float64)
    for block in range(blocks):
        for start in range(0, length - 1, ROWS):
            end = min(start + ROWS, length - 1)
            sums[:, block] += _row_sums(
                torch.tensor(model_BLV[block, start:end]),
                torch.tensor(teacher_BLV[block, start:end]),
                torch.tensor(tokens_BL[block, start + 1 : end + 1], dtype=torch.long),
            )
    kl_B, agreement_B, loss_B = (sums / (length - 1)).numpy()
    return BlockScores(kl_B, agreement_B, loss_B)


def _row_sums(
    model_RV: torch.Tensor, teacher_RV: torch.Tensor, next_R: torch.Tensor
) -> torch.Tensor:
    """Sums over rows of divergence, agreement and loss, float64 ``[3]``."""
    dtype = torch.promote_types(model_RV.dtype, torch.float32)
    log_q, log_p = (x.to(dtype).log_softmax(-1) for x in (model_RV, teacher_RV))
    kl_R = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    agree_R = log_q.argmax(-1) == log_p.argmax(-1)
    loss_R = -log_q.gather(-1, next_R[:, None])[:, 0]
    return torch.stack([x.double().sum() for x in (kl_R, agree_R, loss_R)])


def joined(parts: list[BlockScores]) -> BlockScores:
    """Scores of all blocks of ``parts``, in order."""
    names = ("kl_nats", "top1_agreement", "loss_nats")
    return BlockScores(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def mean_and_stderr(values: np.ndarray) -> tuple[float, float | None]:
    r"""Mean and its standard error :math:`s / \sqrt n`; no error for a single value.

    Raises:
        ValueError: if there is no value.
    """
    if not values.size:
        raise ValueError("the mean of nothing")
    error = float(values.std(ddof=1)) / sqrt(values.size) if values.size > 1 else None
    return float(values.mean()), error
