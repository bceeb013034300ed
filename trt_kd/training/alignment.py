"""A teacher's head whose logits have the student's columns.

Models of one family pad one vocabulary to different sizes. Padding that only the teacher has is
left out, and the softmax of the rest scales it up; padding that only the student has is what the
teacher never says.

Shape suffixes: T tokens, D hidden size, V the student's vocabulary, P padding of the teacher.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trt_kd.losses.top_k import LOG_FLOOR
from trt_kd.teachers.forward import share_dropped
from trt_kd.training.head import Head, pieces, rows_at_a_time


@dataclass(frozen=True)
class AlignedHead:
    """See the module."""

    kept: Head
    """Rows that both models have."""
    dropped: Head | None
    """Rows that only the teacher has."""
    missing: int
    """Rows that only the student has."""

    @property
    def columns(self) -> int:
        """The student's vocabulary."""
        return len(self.kept.weight) + self.missing

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Logits ``[T, V]`` in the head's dtype."""
        kept_TV = self.kept.logits(hidden_TD)
        if not self.missing:
            return kept_TV
        never_T1 = kept_TV.amax(-1, keepdim=True) + LOG_FLOOR
        return torch.cat((kept_TV, never_T1.expand(-1, self.missing)), -1)

    def dropped_mass(self, hidden_TD: Tensor, logits_TV: Tensor) -> Tensor:
        """Sum over the tokens of the probability that was left out, float32 ``[]``."""
        total = torch.zeros((), device=hidden_TD.device)
        if self.dropped is not None:
            step = rows_at_a_time(logits_TV.shape[1], logits_TV.device)
            for rows in pieces(len(hidden_TD), step):
                rest_TP = self.dropped.logits(hidden_TD[rows])
                total += share_dropped(logits_TV[rows], rest_TP).sum()
        return total


def aligned(head: Head, columns: int) -> AlignedHead:
    """Give a teacher's ``head`` as many columns as the student has."""
    size = len(head.weight)
    dropped = head[columns:] if size > columns else None
    return AlignedHead(head[:columns], dropped, max(0, columns - size))
