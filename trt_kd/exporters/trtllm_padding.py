"""MLP channels of zeros, so that tensor parallel ranks share the rest evenly.

A channel whose weights are zero is zero after either activation and adds nothing to any output; its
codes are zero in every format.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor
from torch.nn import functional as F

_ROWS = (
    *(".mlp.gate_proj.weight", ".mlp.gate_proj.weight_quantizer._amax"),
    *(".mlp.up_proj.weight", ".mlp.up_proj.weight_quantizer._amax"),
)
_COLUMNS = {
    ".mlp.down_proj.weight": 0.0,
    ".mlp.down_proj.input_quantizer._amax_for_smoothing": 0.0,
    ".mlp.down_proj.input_quantizer._pre_quant_scale": 1.0,
}
"""What has an entry per channel in its last dimension, with what a further one is."""


class PaddedMlp(Mapping[str, Tensor]):
    """Tensors of a model, those of its MLPs with ``more`` channels after their own ``ffn``."""

    def __init__(self, tensors: Mapping[str, Tensor], ffn: int, more: int) -> None:
        self._tensors, self._ffn, self._more = tensors, ffn, more

    def __getitem__(self, name: str) -> Tensor:
        """Read tensor ``name``; a scale of a whole matrix or of blocks is as it was."""
        tensor = self._tensors[name]
        if not self._more:
            return tensor
        if name.endswith(_ROWS) and tensor.ndim and len(tensor) == self._ffn:
            return F.pad(tensor, (*(0, 0) * (tensor.ndim - 1), 0, self._more))
        for ending, value in _COLUMNS.items():
            if name.endswith(ending) and tensor.shape[-1:] == (self._ffn,):
                return F.pad(tensor, (0, self._more), value=value)
        return tensor

    def __iter__(self) -> Iterator[str]:
        """Names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Count of tensors."""
        return len(self._tensors)
