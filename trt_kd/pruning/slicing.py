"""Cut weights along one dimension, in place; pure torch."""

import torch
from torch import Tensor, nn


def slice_linear(linear: nn.Linear, keep_K: Tensor, dim: int) -> None:
    """Keep rows (``dim`` 0, bias included) or columns (``dim`` 1) ``keep_K`` of ``linear``."""
    linear.weight = _sliced(linear.weight, keep_K, dim)
    if dim == 0:
        linear.out_features = keep_K.numel()
        if linear.bias is not None:
            linear.bias = _sliced(linear.bias, keep_K, 0)
    else:
        linear.in_features = keep_K.numel()


def slice_embedding(embedding: nn.Embedding, keep_K: Tensor) -> None:
    """Keep columns ``keep_K`` of ``embedding``."""
    embedding.weight = _sliced(embedding.weight, keep_K, 1)
    embedding.embedding_dim = keep_K.numel()


def slice_norm(norm: nn.Module, keep_K: Tensor, scale: float) -> None:
    """Keep the entries ``keep_K`` of the weight of ``norm``, times ``scale``."""
    weight: nn.Parameter = norm.get_parameter("weight")
    with torch.no_grad():
        weight.mul_(scale)
    norm.weight = _sliced(weight, keep_K, 0)


def best(scores_C: Tensor, size: int) -> Tensor:
    """Indices of the ``size`` highest scores in ascending order; the earlier one wins a tie."""
    order = scores_C.argsort(descending=True, stable=True)
    return order[:size].sort().values


def _sliced(weight: Tensor, keep_K: Tensor, dim: int) -> nn.Parameter:
    kept = weight.detach().index_select(dim, keep_K.to(weight.device)).contiguous()
    return nn.Parameter(kept, requires_grad=weight.requires_grad)
