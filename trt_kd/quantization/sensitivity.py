r"""What a low-bit format costs in each decoder layer alone.

One layer of the original is replaced by its calibrated twin, every other one stays, and
:math:`D_{KL}(p \| q)` is taken between the predictions before and after, p being the original's.
To one layer's error the others respond about linearly, so the costs of several layers roughly add
up (Dong et al. 2019, HAWQ-V2, arXiv:1911.03852); what they do not add up to is seen beside the cost
of the whole.

Shape suffixes: N blocks, L tokens of a block, V vocabulary.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from trt_kd.errors import ModelError

_TOKENS = 1024


class Original:
    """A model, its decoder layers and what it predicts on a few blocks of text."""

    def __init__(
        self, model: PreTrainedModel, layers: nn.ModuleList, blocks_NL: np.ndarray
    ) -> None:
        """Run ``model`` over ``blocks_NL`` and keep its predictions.

        That takes four bytes for every token and word of the vocabulary.
        """
        self._model, self._layers, self._blocks_NL = model, layers, blocks_NL
        self._log_p = [log_p_LV.cpu() for log_p_LV in self._predictions(model)]

    def divergence(self, model: PreTrainedModel) -> list[float]:
        """Mean KL of every block from the original to ``model``, in nats per token.

        Raises:
            ModelError: if logits of ``model`` are not finite.
        """
        found = []
        for held_LV, log_q_LV in zip(self._log_p, self._predictions(model), strict=True):
            log_p_LV = held_LV.to(log_q_LV.device)
            nats_L = F.kl_div(log_q_LV, log_p_LV, reduction="none", log_target=True).sum(-1)
            found.append(float(nats_L.double().mean()))
        if not np.isfinite(found).all():
            raise ModelError(
                "the quantized model's logits are not finite",
                hint="choose a format with a wider range there, such as fp8",
            )
        return found

    def with_layer(self, twins: nn.ModuleList, layer: int) -> list[float]:
        """Divergence of the original with its ``layer`` replaced by that of ``twins``."""
        own = self._layers[layer]
        self._layers[layer] = twins[layer]
        try:
            return self.divergence(self._model)
        finally:
            self._layers[layer] = own

    def _predictions(self, model: PreTrainedModel) -> Iterator[Tensor]:
        """Log-probabilities ``[L, V]`` in float32 of each block; several share a pass."""
        together = max(1, _TOKENS // self._blocks_NL.shape[1])
        for start in range(0, len(self._blocks_NL), together):
            blocks = np.ascontiguousarray(self._blocks_NL[start : start + together])
            with torch.inference_mode():
                ids = torch.from_numpy(blocks).to(model.device)
                logits_BLV = model(input_ids=ids, use_cache=False).logits
                for logits_LV in logits_BLV:
                    yield logits_LV.float().log_softmax(-1)
