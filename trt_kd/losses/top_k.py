"""A teacher that is known by its k likeliest tokens and the mass of all others.

The others are one bucket: both models' distributions over ``V`` tokens become distributions over
``k + 1`` buckets, and the loss is the dense one between these. Merging tokens never raises an
f-divergence such as KL (data processing inequality), so that its bucketed loss is a lower bound of
the dense one; every loss is the dense one at k = V.

What a bucket hides, some tokens of the tail can tell that were drawn in proportion to the teacher's
probabilities. By the chain rule forward KL is the bucketed one plus, times the tail's mass, that
between the two distributions inside the tail, which the draws estimate without bias, and so its
gradient (Anshumann et al. 2025, arXiv:2503.16870, draw all tokens so).

Shape suffixes: T tokens, N valid tokens, K kept tokens, M drawn tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from trt_kd.losses.maths import scatter_rows, valid, wide

if TYPE_CHECKING:
    from trt_kd.losses.base import KDLoss

LOG_FLOOR = -80.0
"""Least log-mass of the tail, in nats: a tail without mass would make reverse KL infinite."""


@dataclass(frozen=True)
class TopK:
    """Rows of a teacher: kept tokens, their log-probabilities, the log-mass of all others.

    And, where some were drawn, what is known of the others one by one.
    """

    ids: Tensor
    """``[T, K]`` int64, no id twice in a row; in any order."""
    logp: Tensor
    """``[T, K]`` float32, in nats."""
    tail: Tensor
    """``[T]`` float32, in nats; minus infinity where K is the whole vocabulary."""
    inside: "Inside | None" = None
    """Draws from the tail."""

    def __len__(self) -> int:
        """Count of rows."""
        return len(self.tail)

    def __getitem__(self, rows: slice | Tensor) -> "TopK":
        """The rows of a slice or of a bool mask ``[T]``."""
        inside = None if self.inside is None else Inside(*(part[rows] for part in self.inside))
        return TopK(self.ids[rows], self.logp[rows], self.tail[rows], inside)

    def to(self, where: torch.device | torch.dtype) -> "TopK":
        """The same on another device, or with log-probabilities in another dtype."""
        ids_TK = self.ids if isinstance(where, torch.dtype) else self.ids.to(where)
        inside = None if self.inside is None else self.inside.to(where)
        return TopK(ids_TK, self.logp.to(where), self.tail.to(where), inside)


class Inside(NamedTuple):
    """What is known of the tail's own distribution."""

    drawn: Tensor
    """``[T, M]`` int64: its tokens, each as often as it was drawn; in any order."""
    entropy: Tensor
    """``[T]`` float32: its entropy in nats."""

    def to(self, where: torch.device | torch.dtype) -> "Inside":
        """See ``TopK``."""
        drawn_TM = self.drawn if isinstance(where, torch.dtype) else self.drawn.to(where)
        return Inside(drawn_TM, self.entropy.to(where))


def joined(parts: Sequence[TopK]) -> TopK:
    """The rows of all ``parts``, of which all or none have draws."""
    ids, logp, tail = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "logp", "tail")
    )
    drawn = [part.inside for part in parts if part.inside is not None]
    inside = Inside(*map(torch.cat, zip(*drawn, strict=True))) if drawn else None
    return TopK(ids, logp, tail, inside)


def top_k_of(logits_TV: Tensor, k: int, chances_TM: Tensor | None = None) -> TopK:
    """The ``k`` likeliest tokens of every row of logits and the mass of the others.

    With ``chances_TM``, numbers from 0 to 1 of which each is spread evenly, as many of the others
    are drawn: those at which the sum of the tail's probabilities, by id, passes each number.

    Raises:
        ValueError: if there are fewer than ``k`` tokens, or no others to draw.
    """
    vocabulary = logits_TV.shape[-1]
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k {k} is outside of 1 to {vocabulary}, the size of the vocabulary")
    logp_TV = wide(logits_TV).log_softmax(-1)
    logp_TK, ids_TK = logp_TV.topk(k)
    tail_T = logp_TV.scatter_(-1, ids_TK, -torch.inf).logsumexp(-1)
    if k == vocabulary:
        if chances_TM is not None:
            raise ValueError(f"k {k} leaves no token to draw")
        return TopK(ids_TK, logp_TK, tail_T)
    inside = None if chances_TM is None else _drawn(logp_TV.sub_(tail_T[:, None]), chances_TM)
    return TopK(ids_TK, logp_TK, tail_T.clamp_min(LOG_FLOOR), inside)


def _drawn(logp_TV: Tensor, chances_TM: Tensor) -> Inside:
    """Tokens drawn from normalised rows, and the entropy of these; rows may hold minus infinity."""
    p_TV = logp_TV.exp()
    entropy_T = -(p_TV * logp_TV.clamp_min_(LOG_FLOOR)).sum(-1)
    sums_TV = p_TV.cumsum_(-1)
    # Just below the last sum: a chance of 1 minus a rounding must not pass it.
    places_TM = chances_TM.to(sums_TV) * sums_TV[:, -1:] * (1 - 1e-6)
    return Inside(torch.searchsorted(sums_TV, places_TM, right=True), entropy_T)


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
    :math:`h_t e^{z_j - z_t}` for another. Draws, where ``loss`` reads them, add P
    :math:`(e^{z_j - z_t} - n_j / M)` for one that was drawn :math:`n_j` times of M, where P is the
    teacher's mass of the tail. Beside that gradient no tensor has V columns.

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
        inside = kept.inside if loss.reads_draws else None
        mass_N1 = teacher_NK[:, -1:].exp() if inside else torch.zeros_like(rest_N1)
        rest_NV.mul_((gradient_NK[:, -1:] + mass_N1) / rest_N1)
        if inside:
            logq_NM = student_NV.gather(-1, inside.drawn) - peak_N1 - buckets_NK[:, -1:]
            missing_N = logq_NM.mean(-1) + inside.entropy.to(logq_NM.dtype)
            value = value - torch.dot(mass_N1[:, 0], missing_N)
            each_NM = (mass_N1 / -logq_NM.shape[-1]).expand_as(logq_NM)
            rest_NV.scatter_add_(-1, inside.drawn, each_NM)
    rest_NV.scatter_(-1, kept.ids, gradient_NK[:, :count])
    return value, scatter_rows(rest_NV, student_TV, mask_T)


def _bucket_of(labels_N: Tensor, ids_NK: Tensor) -> Tensor:
    """Index of the bucket that holds each label: its place among the kept, or the tail's."""
    found_NK = ids_NK == labels_N.unsqueeze(-1)
    return torch.where(found_NK.any(-1), found_NK.int().argmax(-1), ids_NK.shape[-1])
