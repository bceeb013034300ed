r"""Width of the residual stream.

Source: Muralidharan et al. 2024, Minitron (arXiv:2407.14679), with one difference. An RMSNorm
divides by the root of the mean square over all H channels; over the K kept ones that mean is
larger if what goes is small, and every norm's output would shrink. So the weights of the norms are
multiplied by :math:`\sqrt{H/K}`, which makes the cut of dead channels exact up to the epsilon.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveInt
from typing_extensions import Self

from trt_kd.architectures.shape import ModelShape
from trt_kd.pruning.base import Axis, Site, Unit
from trt_kd.pruning.sizes import grid

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from trt_kd.architectures.base import Architecture


class HiddenAxis(Axis):
    """Keep the best channels of the residual stream, the same ones everywhere."""

    kind: Literal["hidden"] = "hidden"
    constraint: ClassVar[str] = "hidden_size"
    shape_field: ClassVar[str] = "hidden"
    unit: ClassVar[Unit] = "channels"
    size: PositiveInt | None = None
    """Hidden size after pruning; heads keep their size. Open: solved from ``parameters_share``."""
    multiple_of: PositiveInt = 64
    """Tile of the matrix units and of block-wise quantization; off the grid saves no time."""

    @property
    def is_open(self) -> bool:
        """See the base class."""
        return self.size is None

    def target(self, shape: ModelShape) -> int:
        """See the base class."""
        return self.size or shape.hidden

    def legal(self, shape: ModelShape) -> list[int]:
        """See the base class."""
        return grid(shape.hidden, self.multiple_of)

    def resized(self, size: int) -> Self:
        """See the base class."""
        return self.model_copy(update={"size": size})

    def rehearsed(self) -> Self:
        """See the base class."""
        return self

    def sites(self, model: "PreTrainedModel", architecture: "Architecture") -> list[Site]:
        """Outputs of both norms of every layer: what attention and MLP read."""
        layers = architecture.layers(model)
        norms = [norm for layer in layers for norm in architecture.norms(layer)]
        return [Site(norm, "output") for norm in norms]

    def keep(self, scores: "list[Tensor]", shape: ModelShape) -> "list[Tensor]":
        """The channels that score best in sum over all sites."""
        import torch

        from trt_kd.pruning.slicing import best

        total_H = torch.stack(scores).sum(dim=0)
        return [best(total_H, self.target(shape))]

    def cut(
        self,
        model: "PreTrainedModel",
        architecture: "Architecture",
        keep: "Sequence[Tensor]",
    ) -> None:
        """Slice embeddings, norms, head, and every linear that reads or writes the residual."""
        from trt_kd.pruning.slicing import slice_embedding, slice_linear, slice_norm

        (keep_K,) = keep
        embedding, head = architecture.embedding(model), architecture.head(model)
        tied = head.weight is embedding.weight
        scale = (embedding.embedding_dim / keep_K.numel()) ** 0.5
        for norm in architecture.all_norms(model):
            slice_norm(norm, keep_K, scale)
        slice_embedding(embedding, keep_K)
        slice_linear(head, keep_K, 1)
        if tied:
            head.weight = embedding.weight
        for layer in architecture.layers(model):
            for linear in architecture.readers(layer):
                slice_linear(linear, keep_K, 1)
            for linear in architecture.writers(layer):
                slice_linear(linear, keep_K, 0)
        architecture.record_hidden(model, keep_K.numel())
