r"""How far a pruned model is from the one it was cut from, on a few blocks of text.

Shape suffixes: B blocks, L positions, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from trt_kd.architectures.hooks import evaluating
from trt_kd.errors import ModelError


class Reference:
    """Next-token distributions of the unpruned model, held as half-precision logarithms."""

    def __init__(self, model: PreTrainedModel, blocks: Sequence[Tensor]) -> None:
        """Run ``model`` over ``blocks``, token ids ``[L]`` each, and keep what it says.

        That takes two bytes for every token and word of the vocabulary.
        """
        self._blocks = list(blocks)
        self._log_p = [
            _log_probabilities(model, block_L).to(torch.float16).cpu() for block_L in self._blocks
        ]

    def divergence(self, model: PreTrainedModel) -> NDArray[np.float64]:
        r""":math:`D_{KL}(p \| q)` of every block, q from ``model``: ``[B]`` in nats per token.

        Raises:
            ModelError: if logits of ``model`` are not finite.
        """
        found = []
        for block_L, log_p_LV in zip(self._blocks, self._log_p, strict=True):
            log_q_LV = _log_probabilities(model, block_L)
            held_LV = log_p_LV.to(log_q_LV)
            nats_L = F.kl_div(log_q_LV, held_LV, reduction="none", log_target=True).sum(-1)
            found.append(float(nats_L.double().mean()))
        if not np.isfinite(found).all():
            raise ModelError(
                "the pruned model's logits are not finite",
                hint="cut less, or raise calibration_tokens so that the refit sees more text",
            )
        return np.array(found)


def _log_probabilities(model: PreTrainedModel, block_L: Tensor) -> Tensor:
    """Log-probabilities ``[L - 1, V]`` in float32; the last position predicts nothing."""
    with evaluating(model), torch.no_grad():
        outputs = model(input_ids=block_L[None].to(model.device), use_cache=False)
    logits_LV: Tensor = outputs.logits[0, :-1]
    return logits_LV.float().log_softmax(-1)
