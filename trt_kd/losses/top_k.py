"""A teacher that is known by its k likeliest tokens and the mass of all others.

The others are one bucket: both models' distributions over ``V`` tokens become distributions over
``k + 1`` buckets, and the loss is the dense one between these. Merging tokens never raises an
f-divergence such as KL (data processing inequality), so that its bucketed loss is a lower bound of
the dense one; every loss is the dense one at k = V.

Shape suffixes: T tokens, N valid tokens, K kept tokens, V vocabulary.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trt_kd.losses.maths import scatter_rows, valid, wide

if TYPE_CHECKING:
    from trt_kd.losses.base import KDLoss

LOG_FLOOR = -80.0
"""Least log-mass of the tail, in nats: a tail without mass would make reverse KL infinite."""


@dataclass(frozen=True)
class TopK:
    """Rows of a teacher: kept tokens, their log-probabilities, the log-mass of all others."""

    ids: Tensor
    """``[T, K]`` int64, no id twice in a row; in any order."""
    logp: Tensor
    """``[T, K]`` float32, in nats."""
    tail: Tensor
    """``[T]`` float32, in nats; minus infinity where K is the whole vocabulary."""

    def __len__(self) -> int:
        """Count of rows."""
        return len(self.tail)

    def __getitem__(self, rows: slice | Tensor) -> "TopK":
        """The rows of a slice or of a bool mask ``[T]``."""
        return TopK(self.ids[rows], self.logp[rows], self.tail[rows])

    def to(self, where: torch.device | torch.dtype) -> "TopK":
        """The same on another device, or with log-probabilities in another dtype."""
        ids_TK = self.ids if isinstance(where, torch.dtype) else self.ids.to(where)
        return TopK(ids_TK, self.logp.to(where), self.tail.to(where))


def top_k_of(logits_TV: Tensor, k: int) -> TopK:
    """The ``k`` likeliest tokens of every row of logits and the mass of the others.

    Raises:
        ValueError: if there are fewer than ``k`` tokens.
    """
    vocabulary = logits_TV.shape[-1]
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k {k} is outside of 1 to {vocabulary}, the size of the vocabulary")
    logp_TV = wide(logits_TV).log_softmax(-1)
    logp_TK, ids_TK = logp_TV.topk(k)
    tail_T = logp_TV.scatter_(-1, ids_TK, -torch.inf).logsumexp(-1)
    return TopK(ids_TK, logp_TK, tail_T.clamp_min(LOG_FLOOR) if k < vocabulary else tail_T)


def bucketed(
    loss: "KDLoss",
    student_TV: Tensor,
    top: TopK,
    mask_T: Tensor,
    labels_T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Loss between the bucketed distributions and its gradient by ``student_TV``.

    With the tail's logit :math:`z_t = \log \sum_{j \notin K} e^{z_j}` and the loss's gradient h by
    the k + 1 logits, the gradient by :math:`z_j` is :math:`h_j` for a kept token and
    :math:`h_t e^{z_j - z_t}` for another. Beside that gradient no tensor has V columns.

    Raises:
        ValueError: if the rows differ in number.
    """
    if len(student_TV) != len(top):
        raise ValueError(f"{len(student_TV)} rows of the student, {len(top)} of the teacher")
    student_NV = wide(valid(student_TV.detach(), mask_T))
    kept = top if bool(mask_T.all()) else top[mask_T]
    peak_N1 = student_NV.amax(-1, keepdim=True)
    buckets_NK = student_NV.gather(-1, kept.ids) - peak_N1
    teacher_NK = kept.logp.to(buckets_NK.dtype)
    rest_NV = (student_NV - peak_N1).exp_().scatter_(-1, kept.ids, 0.0)
    rest_N1 = rest_NV.sum(-1, keepdim=True).clamp_min_(torch.finfo(rest_NV.dtype).tiny)
    everything_N = torch.ones(len(kept), dtype=torch.bool, device=student_TV.device)
    count = kept.ids.shape[-1]
    if count < student_NV.shape[-1]:
        buckets_NK = torch.cat((buckets_NK, rest_N1.log()), -1)
        tail_N1 = kept.tail.to(teacher_NK.dtype).clamp_min(LOG_FLOOR).unsqueeze(-1)
        teacher_NK = torch.cat((teacher_NK, tail_N1), -1)
    labels_N = None if labels_T is None else _bucket_of(valid(labels_T, mask_T), kept.ids)
    value, gradient_NK = loss.value_and_gradient(buckets_NK, teacher_NK, everything_N, labels_N)
    if count < student_NV.shape[-1]:
        rest_NV.mul_(gradient_NK[:, -1:] / rest_N1)
    rest_NV.scatter_(-1, kept.ids, gradient_NK[:, :count])
    return value, scatter_rows(rest_NV, student_TV, mask_T)


def _bucket_of(labels_N: Tensor, ids_NK: Tensor) -> Tensor:
    """Index of the bucket that holds each label: its place among the kept, or the tail's."""
    found_NK = ids_NK == labels_N.unsqueeze(-1)
    return torch.where(found_NK.any(-1), found_NK.int().argmax(-1), ids_NK.shape[-1])
