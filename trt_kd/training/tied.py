"""The gradient of an embedding that is the head's weight too."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


@contextmanager
def rows_into_head(model: Any) -> Iterator[None]:
    """Let a tied embedding add its gradient to the head's, row by row, where that stands.

    Plain autograd fills a second tensor of the size of the vocabulary with zeros, in which the
    tokens of a step are few rows, and adds that. For losses that always reach the head, in one
    process whose weights are whole. An embedding of another kind stays plain.
    """
    embedding = model.get_input_embeddings()
    if not _is_plain(embedding) or embedding.weight is not model.get_output_embeddings().weight:
        yield
        return
    rows = _Rows(embedding)
    embedding.forward = rows.forward
    hook = embedding.weight.register_post_accumulate_grad_hook(rows.flush)
    try:
        yield
    finally:
        hook.remove()
        del embedding.forward


class _Rows:
    """The rows of one embedding, and what waits to be added to its gradient."""

    def __init__(self, embedding: nn.Embedding) -> None:
        self._embedding = embedding
        self._root = torch.empty(0, requires_grad=True)  # makes autograd call the backward pass
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def forward(self, ids_BL: Tensor) -> Tensor:
        """The rows, as ``nn.Embedding`` gives them."""
        return cast("Tensor", _Lookup.apply(self._root, self, ids_BL))  # type: ignore[no-untyped-call]

    def rows(self, ids_BL: Tensor) -> Tensor:
        """The rows without a graph."""
        return F.embedding(ids_BL, self._embedding.weight.detach())

    def take(self, ids_BL: Tensor, gradient_BLD: Tensor) -> None:
        """Add to the gradient, at once or as soon as there is one: the head's comes either way."""
        weight_VD, padding = self._embedding.weight, self._embedding.padding_idx
        if padding is not None:
            gradient_BLD = gradient_BLD.masked_fill((ids_BL == padding)[..., None], 0)
        self._waiting.append((ids_BL.flatten(), gradient_BLD.flatten(0, -2).to(weight_VD.dtype)))
        if weight_VD.grad is not None:
            self.flush(weight_VD)

    def flush(self, weight_VD: Tensor) -> None:
        """Add what waits."""
        gradient_VD = cast("Tensor", weight_VD.grad)
        while self._waiting:
            gradient_VD.index_add_(0, *self._waiting.pop())


class _Lookup(torch.autograd.Function):
    """Rows of a weight that is not an input here, so that autograd makes no gradient for it."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, rows: _Rows, ids_BL: Tensor) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(ids_BL)
        return rows.rows(ids_BL)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BLD: Tensor) -> tuple[None, None, None]:
        ctx.rows.take(*ctx.saved_tensors, gradient_BLD)
        return None, None, None


def _is_plain(embedding: Any) -> bool:
    return (
        isinstance(embedding, nn.Embedding)
        and type(embedding).forward is nn.Embedding.forward
        and "forward" not in vars(embedding)
        and embedding.weight.requires_grad
        and embedding.max_norm is None
        and not (embedding.scale_grad_by_freq or embedding.sparse)
    )
