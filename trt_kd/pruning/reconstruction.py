"""After an MLP lost channels, refit its down projection to do the most with what is left."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import PositiveFloat

from trt_kd.architectures.shape import ModelShape
from trt_kd.config import StrictModel

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from trt_kd.architectures.base import Architecture
    from trt_kd.pruning.ridge import Refit


class Reconstruct(StrictModel):
    """One ridge regression per layer, from the unpruned model's activations; see ``ridge.py``."""

    ridge: PositiveFloat = 0.01
    """Pull towards the plain cut, as a share of the mean squared activation."""
    memory_gib: PositiveFloat = 4.0
    """Limit for the Gram matrices held at once; more layers than fit cost more forward passes."""

    def groups(self, shape: ModelShape) -> list[list[int]]:
        """Layers whose Gram matrices (float32) are held at once; at least one a group."""
        size = max(1, int(self.memory_gib * 2**30) // gram_bytes(shape))
        return [
            list(range(first, min(first + size, shape.layers)))
            for first in range(0, shape.layers, size)
        ]

    def memory_bytes(self, shape: ModelShape) -> int:
        """Most bytes it holds at once: one group's matrices and one solution in float64."""
        return len(self.groups(shape)[0]) * gram_bytes(shape) + 6 * gram_bytes(shape)


def gram_bytes(shape: ModelShape) -> int:
    """Bytes of one layer's Gram matrix in float32."""
    return 4 * shape.ffn**2


def refit_layers(
    model: "PreTrainedModel",
    architecture: "Architecture",
    gram_CC: "Mapping[int, Tensor]",
    keep: "Sequence[Tensor]",
    ridge: float,
) -> "dict[int, Refit]":
    """Solve for the down projection of every layer in ``gram_CC``; the model stays as it is."""
    from trt_kd.pruning.ridge import refit

    layers = architecture.layers(model)
    return {
        layer: refit(architecture.mlp(layers[layer]).down.weight, gram, keep[layer], ridge)
        for layer, gram in gram_CC.items()
    }


def write_refits(
    model: "PreTrainedModel",
    architecture: "Architecture",
    refits: "Mapping[int, Refit]",
    keep: "Sequence[Tensor]",
) -> None:
    """Put the solutions into the columns that will be kept, so that any order of cuts works."""
    import torch

    layers = architecture.layers(model)
    with torch.no_grad():
        for layer, solution in refits.items():
            weight = architecture.mlp(layers[layer]).down.weight
            weight[:, keep[layer]] = solution.weight.to(weight)
