"""Causal attention for training on CPUs, by blocks of queries.

At the lengths of distillation torch's CPU kernel multiplies every query with every key and takes
most of its time outside of matrix products. Here a block of queries is multiplied with the keys up
to its end, heads that share keys in one product, and the backward pass makes the probabilities
again, so that only the inputs are kept. Scores have the dtype of the inputs, as in transformers'
eager attention; in float32 there is nothing to gain, and torch's kernel stays.

Shape suffixes: B sequences, L positions, D head size, H query heads, G key-value heads,
R query heads that share one, N sequences times key-value heads, Q rows of one block (heads that
share keys times queries), K keys up to the block's end.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trt_kd.training.lean_functions import apply, autocast_dtype

NAME = "sdpa"
"""Of the attention that is replaced, in transformers."""
SMALLEST_BLOCK, BLOCKS = 64, 8
"""Queries of a block at least, and blocks at most: the products must be large ones."""

Attention = Callable[..., tuple[Tensor, Tensor | None]]


@contextmanager
def attending_by(name: str, wrap: Callable[[Attention], Attention]) -> Iterator[None]:
    """Put ``wrap`` of what computes the attention ``name`` of transformers in its place.

    Meanwhile this is so in the whole process; after it, what was in the place before is again.

    Raises:
        KeyError: if there is no attention of this name.
    """
    plain: Attention = ALL_ATTENTION_FUNCTIONS[name]
    own: dict[str, Attention] = ALL_ATTENTION_FUNCTIONS._local_mapping
    replaced = name in own
    own[name] = wrap(plain)
    try:
        yield
    finally:
        if replaced:
            own[name] = plain
        else:
            del own[name]


def blockwise_attention() -> AbstractContextManager[None]:
    """Let models that attend through torch's ``scaled_dot_product_attention`` do it by blocks.

    Meanwhile this is so in the whole process, for what is plainly causal, in two bytes per number
    and on a CPU; all else goes the usual way.
    """
    return attending_by(NAME, _by_blocks)


def _by_blocks(plain: Attention) -> Attention:
    def attention(
        module: Any,
        query_BHLD: Tensor,
        key_BGLD: Tensor,
        value_BGLD: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        states = (query_BHLD, key_BGLD, value_BGLD)
        dtype = autocast_dtype(query_BHLD) or query_BHLD.dtype
        narrow = dtype.itemsize == 2
        if narrow and attention_mask is None and _is_plain(module, options) and _fits(*states):
            scale = options.get("scaling")
            scale = query_BHLD.shape[-1] ** -0.5 if scale is None else scale
            return apply(CausalAttention, *(one.to(dtype) for one in states), scale), None
        return plain(module, *states, attention_mask, **options)

    return attention


def _is_plain(module: Any, options: dict[str, Any]) -> bool:
    """Whether without a mask a call means causal attention and nothing else."""
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    added = (options.get("position_bias"), options.get("head_mask"))
    return bool(causal) and not options.get("dropout") and added == (None, None)


def _fits(query_BHLD: Tensor, key_BGLD: Tensor, value_BGLD: Tensor) -> bool:
    """Whether these are whole sequences that attend to themselves, on a CPU."""
    _, heads, length, _ = query_BHLD.shape
    groups = key_BGLD.shape[1]
    return (
        query_BHLD.device.type == "cpu"
        and length > 1
        and key_BGLD.shape == value_BGLD.shape
        and key_BGLD.shape[2:] == query_BHLD.shape[2:]
        and heads % groups == 0
    )


@dataclass(frozen=True)
class _Block:
    """Queries that are multiplied at once."""

    start: int
    end: int
    """Where they, and the keys that they may see, end."""
    later: Tensor
    """``[size, size]`` bool: which of the block's own keys a query must not see."""

    def take(self, states_BLGRD: Tensor) -> Tensor:
        """Rows ``[N, Q, D]`` of all queries, heads that share keys one after the other."""
        block = states_BLGRD[:, self.start : self.end].permute(0, 2, 3, 1, 4)
        return block.reshape(block.shape[0] * block.shape[1], -1, block.shape[-1])

    def put(self, states_BLGRD: Tensor, rows_NQD: Tensor) -> None:
        """Write such rows back."""
        block = states_BLGRD[:, self.start : self.end]
        batch, queries, groups, shared, width = block.shape
        rows = rows_NQD.view(batch, groups, shared, queries, width)
        block.copy_(rows.permute(0, 3, 1, 2, 4))

    def probabilities(self, query_NQD: Tensor, key_NKD: Tensor, scale: float) -> Tensor:
        """Softmax over the keys up to every query's own, ``[N, Q, K]``."""
        scores_NQK = torch.bmm(query_NQD * scale, key_NKD.mT)
        own = scores_NQK.view(len(scores_NQK), -1, len(self.later), self.end)[..., self.start :]
        own.masked_fill_(self.later, -torch.inf)
        return scores_NQK.softmax(-1)


class CausalAttention(torch.autograd.Function):
    """Keeps queries, keys and values; nothing as long as the square of the length."""

    @staticmethod
    def forward(
        ctx: Any, query_BHLD: Tensor, key_BGLD: Tensor, value_BGLD: Tensor, scale: float
    ) -> Tensor:
        """What every head gathers, ``[B, L, H, D]``."""
        query_BLGRD = _grouped(query_BHLD.transpose(1, 2), key_BGLD.shape[1])
        key_NLD, value_NLD = key_BGLD.flatten(0, 1), value_BGLD.flatten(0, 1)
        output_BLGRD = torch.empty_like(query_BLGRD, memory_format=torch.contiguous_format)
        for block in _blocks(query_BHLD.shape[2]):
            keys_NKD, values_NKD = key_NLD[:, : block.end], value_NLD[:, : block.end]
            p_NQK = block.probabilities(block.take(query_BLGRD), keys_NKD, scale)
            block.put(output_BLGRD, torch.bmm(p_NQK, values_NKD))
        ctx.save_for_backward(query_BHLD, key_BGLD, value_BGLD)
        ctx.scale = scale
        return output_BLGRD.flatten(2, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BLHD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of queries, keys and values; sums over blocks are in float32."""
        query_BHLD, key_BGLD, value_BGLD = ctx.saved_tensors
        groups, dtype = key_BGLD.shape[1], query_BHLD.dtype
        query_BLGRD = _grouped(query_BHLD.transpose(1, 2), groups)
        gradient_BLGRD = _grouped(gradient_BLHD, groups)
        key_NLD, value_NLD = key_BGLD.flatten(0, 1), value_BGLD.flatten(0, 1)
        wide = torch.promote_types(dtype, torch.float32)
        key_sum_NLD, value_sum_NLD = (torch.zeros_like(key_NLD, dtype=wide) for _ in range(2))
        query_gradient_BLGRD = torch.empty_like(gradient_BLGRD)
        with torch.autocast(query_BHLD.device.type, enabled=False):
            for block in _blocks(query_BHLD.shape[2]):
                keys_NKD, values_NKD = key_NLD[:, : block.end], value_NLD[:, : block.end]
                rows_NQD, gradient_NQD = block.take(query_BLGRD), block.take(gradient_BLGRD)
                p_NQK = block.probabilities(rows_NQD, keys_NKD, ctx.scale)
                value_sum_NLD[:, : block.end] += torch.bmm(p_NQK.mT, gradient_NQD)
                p_gradient_NQK = torch.bmm(gradient_NQD, values_NKD.mT)
                gradient_NQK = torch._softmax_backward_data(p_gradient_NQK, p_NQK, -1, dtype)
                block.put(query_gradient_BLGRD, torch.bmm(gradient_NQK, keys_NKD))
                key_sum_NLD[:, : block.end] += torch.bmm(gradient_NQK.mT, rows_NQD)
        return (
            query_gradient_BLGRD.mul_(ctx.scale).flatten(2, 3).transpose(1, 2),
            key_sum_NLD.mul_(ctx.scale).to(dtype).view_as(key_BGLD),
            value_sum_NLD.to(dtype).view_as(value_BGLD),
            None,
        )


def _blocks(length: int) -> list[_Block]:
    size = max(SMALLEST_BLOCK, -(-length // BLOCKS))
    later = torch.ones(size, size, dtype=torch.bool).triu_(1)
    ends = [(start, min(start + size, length)) for start in range(0, length, size)]
    return [_Block(start, end, later[: end - start, : end - start]) for start, end in ends]


def _grouped(states_BLHD: Tensor, groups: int) -> Tensor:
    """Heads apart by the keys that they share, ``[B, L, G, R, D]``."""
    batch, length, _, width = states_BLHD.shape
    return states_BLHD.reshape(batch, length, groups, -1, width)
