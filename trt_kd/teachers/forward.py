"""The teacher's forward pass over token blocks, its head piece by piece.

Shape suffixes: B blocks, L positions, T rows, D hidden size, V vocabulary, K kept tokens, M drawn
tokens.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from trt_kd.errors import ModelError
from trt_kd.losses.maths import wide
from trt_kd.losses.top_k import TopK, joined, top_k_of
from trt_kd.teachers.base import Precision
from trt_kd.teachers.coding import Kept
from trt_kd.teachers.shards import sample_ids

LOGITS_BYTES = 64 << 20
"""Size of the float32 logits that exist at a time."""


class Rows(NamedTuple):
    """What is known of one block of L tokens: L - 1 rows."""

    kept: Kept
    """What a cache keeps of them."""
    dropped: NDArray[np.float32]
    """Probability of tokens that are left out of the vocabulary ``[L - 1]``."""


@torch.no_grad()
def top_k_rows(
    model: PreTrainedModel,
    blocks: NDArray[np.int64],
    *,
    k: int,
    precision: Precision,
    vocabulary: int | None = None,
    draws: int = 0,
) -> list[Rows]:
    """Rows of every block ``[B, L]``: the ``k`` likeliest tokens, and ``draws`` of the others.

    The same logits, bf16 rounding included, as an online teacher's. Where ``vocabulary`` is less
    than the teacher's, tokens from there on are left out and the others scaled up. What is drawn
    follows from the block.

    Raises:
        ModelError: if the teacher gives NaN or infinity.
    """
    chances_TM = torch.from_numpy(_chances(blocks, draws)) if draws else None
    top, dropped_T = _top_k(model, blocks, k, precision, vocabulary, chances_TM)
    if not bool(top.logp.isfinite().all()):
        raise ModelError(
            "the teacher's log-probabilities are not finite",
            hint="set precision: fp32, or look for NaN in its weights",
        )
    known = (top.ids, top.logp, top.tail, *(top.inside or ()), dropped_T)
    whole = [np.split(part.cpu().numpy(), len(blocks)) for part in known]
    keep = Kept if draws else Kept.without_draws
    return [Rows(keep(*kept), dropped) for *kept, dropped in zip(*whole, strict=True)]


def _chances(blocks: NDArray[np.int64], draws: int) -> NDArray[np.float32]:
    """Numbers from 0 to 1 for every row, ``[B * (L - 1), draws]``, evenly apart in a row.

    One shift by chance for all of a row: of all ways to draw without bias it varies least.
    """
    shifts = [
        np.random.default_rng(int.from_bytes(sample, "little")).random(blocks.shape[1] - 1)
        for sample in sample_ids(blocks)
    ]
    chances_TM = (np.concatenate(shifts)[:, None] + np.arange(draws)) / draws
    return chances_TM.astype(np.float32)


def check_dropped_mass(
    model: PreTrainedModel,
    blocks: NDArray[np.int64],
    vocabulary: int,
    precision: Precision,
    *,
    limit: float,
) -> None:
    """Check what the teacher gives, on ``blocks``, to tokens from ``vocabulary`` on.

    Raises:
        ModelError: if it is more than ``limit`` per token on average.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if vocabulary >= len(head.weight):
        return
    rows = top_k_rows(model, blocks, k=1, precision=precision, vocabulary=vocabulary)
    mass = float(np.mean([row.dropped for row in rows]))
    if not mass <= limit:
        raise ModelError(
            f"the teacher gives {mass:.2g} of its probability per token to the "
            f"{len(head.weight) - vocabulary:,} tokens that the student lacks, limit {limit:g}",
            hint="use a student of the teacher's vocabulary, or raise teacher.max_dropped_mass",
        )


def share_dropped(kept_TV: Tensor, dropped_TP: Tensor) -> Tensor:
    """Probability ``[T]`` of the tokens behind ``dropped_TP`` among all, from logits, float32."""
    return torch.sigmoid(wide(dropped_TP).logsumexp(-1) - wide(kept_TV).logsumexp(-1))


def _top_k(
    model: PreTrainedModel,
    blocks: NDArray[np.int64],
    k: int,
    precision: Precision,
    vocabulary: int | None,
    chances_TM: Tensor | None,
) -> tuple[TopK, Tensor]:
    """Rows of all T positions, some logits at a time, and the mass that is left out."""
    tokens_BL = torch.from_numpy(np.ascontiguousarray(blocks)).to(model.device)
    parts: Any = model
    with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
        hidden_BLD = parts.base_model(input_ids=tokens_BL, use_cache=False).last_hidden_state
    head = parts.get_output_embeddings()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    weight_VD, bias_V = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
    tops, dropped = [], []
    hidden_TD = hidden_BLD[:, :-1].flatten(0, 1).to(dtype)
    step = max(1, LOGITS_BYTES // (4 * len(weight_VD)))
    for start in range(0, len(hidden_TD), step):
        rows = slice(start, start + step)
        logits_TV = functional.linear(hidden_TD[rows], weight_VD, bias_V)
        kept_TV, rest_TP = logits_TV[:, :vocabulary], logits_TV[:, vocabulary or len(weight_VD) :]
        chances = None if chances_TM is None else chances_TM[rows].to(logits_TV.device)
        tops.append(top_k_of(kept_TV, k, chances))
        dropped.append(
            share_dropped(kept_TV, rest_TP) if rest_TP.shape[1] else torch.zeros(len(logits_TV))
        )
    return joined(tops), torch.cat(dropped)


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
