"""The teacher's forward pass over token blocks, its head piece by piece.

Shape suffixes: B blocks, L positions, T rows, D hidden size, V vocabulary, K kept tokens.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from trt_kd.errors import ModelError
from trt_kd.losses.top_k import TopK, top_k_of
from trt_kd.teachers.base import Precision

LOGITS_BYTES = 64 << 20
"""Size of the float32 logits that exist at a time."""


Rows = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]


@torch.no_grad()
def top_k_rows(
    model: PreTrainedModel, blocks: NDArray[np.int64], *, k: int, precision: Precision
) -> list[Rows]:
    """Ids, log-probabilities and tail, of every block ``[B, L]``, L - 1 rows each.

    The same logits, bf16 rounding included, as an online teacher's.

    Raises:
        ModelError: if the teacher gives NaN or infinity.
    """
    tokens_BL = torch.from_numpy(np.ascontiguousarray(blocks)).to(model.device)
    parts: Any = model
    with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
        hidden_BLD = parts.base_model(input_ids=tokens_BL, use_cache=False).last_hidden_state
    head = parts.get_output_embeddings()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    top = _top_k(head, hidden_BLD[:, :-1].flatten(0, 1), k, dtype)
    if not bool(top.logp.isfinite().all()):
        raise ModelError(
            "the teacher's log-probabilities are not finite",
            hint="set precision: fp32, or look for NaN in its weights",
        )
    whole = [part.cpu().numpy() for part in (top.ids, top.logp, top.tail)]
    return list(zip(*(np.split(part, len(blocks)) for part in whole), strict=True))


def _top_k(head: nn.Linear, hidden_TD: Tensor, k: int, dtype: torch.dtype) -> TopK:
    """Rows of all T hidden states, some logits at a time."""
    weight_VD, bias_V = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
    step = max(1, LOGITS_BYTES // (4 * len(weight_VD)))
    pieces = torch.split(hidden_TD.to(dtype), step)
    tops = [top_k_of(functional.linear(piece, weight_VD, bias_V), k) for piece in pieces]
    return TopK(
        torch.cat([top.ids for top in tops]),
        torch.cat([top.logp for top in tops]),
        torch.cat([top.tail for top in tops]),
    )


def check_linear_head(model: Any, role: str) -> None:
    """Check that logits are a linear map of hidden states and nothing after it.

    Raises:
        ModelError: if the head is none, its output is scaled or capped, or logits are not finite.
    """
    head = model.get_output_embeddings()
    seen: list[Tensor] = []
    if isinstance(head, nn.Linear):
        hook = head.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        try:
            with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16):
                tokens_BL = torch.tensor([[0, 1]], device=model.device)
                logits = model(input_ids=tokens_BL, use_cache=False).logits
        finally:
            hook.remove()
    if seen and not bool(seen[0].isfinite().all()):
        raise ModelError(
            f"the {role}'s logits are not finite",
            hint="its weights are damaged, NaN or infinity among them: make it again",
        )
    if len(seen) != 1 or not torch.equal(seen[0].to(logits.dtype), logits):
        raise ModelError(
            f"the {role}'s logits ({model.config.model_type}) are not those of a linear head",
            hint="models that scale or cap their logits are not supported",
        )
