"""One distribution from several teachers' logits.

Shape suffixes: T tokens, V vocabulary, N teachers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trt_kd.losses.maths import wide

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trt_kd.teachers.several import Combine


@dataclass(frozen=True)
class Mixture:
    """Frozen teachers and how they become one."""

    models: "Sequence[PreTrainedModel]"
    """Each with a linear head."""
    shares: tuple[float, ...]
    """Weights that sum to 1."""
    combine: "Combine"
    """See ``SeveralTeachers``."""


@dataclass(frozen=True)
class MixedRows:
    """Logits of several teachers, mixed where and when rows are asked for."""

    parts: Sequence[Tensor]
    """``[T, V]`` of each teacher."""
    shares: tuple[float, ...]
    """Weights that sum to 1."""
    of_logits: bool
    """Mean of logits, not of probabilities."""

    def __getitem__(self, rows: slice) -> Tensor:
        """Logits ``[T, V]`` of the mixture, at least float32."""
        pairs = zip(self.parts, self.shares, strict=True)
        if self.of_logits:
            terms = (wide(part[rows]) * share for part, share in pairs)
            return sum(terms, start=torch.zeros((), device=self.parts[0].device))
        weighted = [wide(part[rows]).log_softmax(-1).add_(log(share)) for part, share in pairs]
        mixed_TV = weighted[0]
        for other_TV in weighted[1:]:
            torch.logaddexp(mixed_TV, other_TV, out=mixed_TV)
        return mixed_TV
