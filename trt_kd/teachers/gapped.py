"""A teacher that speaks at some of the student's tokens only.

Shape suffixes: T tokens, U the teacher's vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GappedRows:
    """Logits at the tokens where the teacher has something to say."""

    logits: Tensor
    """``[T, U]``; rows of the other tokens may hold anything."""
    known: Tensor
    """Where it has, bool ``[T]``."""

    def __getitem__(self, rows: slice) -> "GappedRows":
        """The same for a slice of the tokens."""
        return GappedRows(self.logits[rows], self.known[rows])

    def to(self, dtype: torch.dtype) -> "GappedRows":
        """The same with logits in ``dtype``."""
        return GappedRows(self.logits.to(dtype), self.known)
