"""How far two models' predictions on the same tokens are apart.

Shape suffixes: B sequences, L positions, V vocabulary.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_TOKENS = 1024


@dataclass(frozen=True)
class Difference:
    """Distance of a model's predictions to a reference's, over ``tokens`` positions."""

    kl_nats: float
    """Mean over positions of KL(reference || other), in nats."""
    max_abs: float
    """Largest absolute difference of two logits; infinite where one is not a number."""
    top1_agreement: float
    """Share of positions where both prefer the same token."""
    tokens: int


def compare(reference: Iterable[np.ndarray], other: Iterable[np.ndarray]) -> Difference:
    """Compare logits ``[B, L, V]`` block by block, in float64.

    A logit that is not a finite number makes the KL infinite.

    Raises:
        ValueError: if there is nothing to compare or shapes or counts differ.
    """
    kl, largest, same, tokens = 0.0, 0.0, 0, 0
    for expected_BLV, actual_BLV in zip(reference, other, strict=True):
        if expected_BLV.shape != actual_BLV.shape:
            raise ValueError(
                f"logits of shape {expected_BLV.shape} and {actual_BLV.shape} do not compare"
            )
        for expected_LV, actual_LV in zip(expected_BLV, actual_BLV, strict=True):
            if not (np.isfinite(expected_LV).all() and np.isfinite(actual_LV).all()):
                return Difference(float("inf"), float("inf"), 0.0, tokens + len(expected_LV))
            kl += _kl_sum(expected_LV, actual_LV)
            largest = max(largest, float(np.abs(expected_LV - actual_LV).max()))
            same += int((expected_LV.argmax(-1) == actual_LV.argmax(-1)).sum())
            tokens += len(expected_LV)
    if not tokens:
        raise ValueError("no position to compare")
    return Difference(kl / tokens, largest, same / tokens, tokens)


def logits_of(model: "PreTrainedModel", blocks_NL: np.ndarray) -> Iterator[np.ndarray]:
    """Logits ``[1, L, V]`` in float32 of each block.

    Several blocks share a pass: a simulated format rounds every weight anew in each.
    """
    import torch

    together = max(1, _TOKENS // blocks_NL.shape[1])
    for start in range(0, len(blocks_NL), together):
        with torch.inference_mode():
            ids = torch.as_tensor(blocks_NL[start : start + together], device=model.device)
            logits_BLV = model(ids, use_cache=False).logits.float().cpu().numpy()
        for logits_LV in logits_BLV:
            yield logits_LV[None]


def _kl_sum(expected_LV: np.ndarray, actual_LV: np.ndarray) -> float:
    log_p, log_q = _log_softmax(expected_LV), _log_softmax(actual_LV)
    return float((np.exp(log_p) * (log_p - log_q)).sum())


def _log_softmax(logits_LV: np.ndarray) -> np.ndarray:
    shifted = logits_LV.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted
