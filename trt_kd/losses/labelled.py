"""Decoupled KL and minifinetuning: losses that know the true next token.

As in ``maths``, ``x_gradient`` returns what ``x`` returns and the gradient in closed form; p is
the teacher, q the student.

Shape suffixes: T tokens, V vocabulary, N valid tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from trt_kd.losses.maths import log_probs, scatter_rows, softened, valid


def true_tokens(labels_T: Tensor | None, kind: str) -> Tensor:
    """``labels_T``.

    Raises:
        ValueError: if there are none.
    """
    if labels_T is None:
        raise ValueError(f"{kind} needs labels: pass the true next tokens, int64 [T]")
    return labels_T


def decoupled_kl(
    student_TV: Tensor,
    teacher_TV: Tensor,
    mask_T: Tensor,
    labels_T: Tensor,
    *,
    weights: tuple[float, float],
    temperature: float,
) -> Tensor:
    """Weighted sum of the label's binary KL and of KL among all other tokens, times tau squared.

    Args:
        student_TV: logits.
        teacher_TV: logits.
        mask_T: which rows are valid.
        labels_T: true next tokens, int64.
        weights: of the label's part and of the others' part.
        temperature: softens both distributions.
    """
    student, teacher = softened(student_TV, teacher_TV, mask_T, temperature)
    labels_N1 = valid(labels_T, mask_T).unsqueeze(-1)
    (pair_q, rest_q), (pair_p, rest_p) = _split(student, labels_N1), _split(teacher, labels_N1)
    label = F.kl_div(pair_q, pair_p, reduction="sum", log_target=True)
    others = F.kl_div(rest_q, rest_p, reduction="sum", log_target=True)
    return temperature**2 * (weights[0] * label + weights[1] * others)


def decoupled_kl_gradient(
    student_TV: Tensor,
    teacher_TV: Tensor,
    mask_T: Tensor,
    labels_T: Tensor,
    *,
    weights: tuple[float, float],
    temperature: float,
) -> tuple[Tensor, Tensor]:
    r"""Return ``decoupled_kl`` and its gradient.

    With distributions :math:`\hat q, \hat p` among the others and weights a, b: temperature times
    :math:`a (q_t - p_t)` for the label t and
    :math:`b (\hat q_j - \hat p_j) - a (q_t - p_t) \hat q_j` for another token j.
    """
    with torch.no_grad():
        student, teacher = softened(student_TV, teacher_TV, mask_T, temperature)
        labels_N1 = valid(labels_T, mask_T).unsqueeze(-1)
        (pair_q, rest_q), (pair_p, rest_p) = _split(student, labels_N1), _split(teacher, labels_N1)
        label = F.kl_div(pair_q, pair_p, reduction="sum", log_target=True)
        p_rest = rest_p.exp()
        others = torch.dot(p_rest.flatten(), rest_p.sub_(rest_q).flatten())
        value = temperature**2 * (weights[0] * label + weights[1] * others)
        push_N1 = weights[0] * (pair_q.exp() - pair_p.exp())[:, :1]
        gradient_NV = rest_q.exp_().mul_(weights[1] - push_N1).sub_(p_rest, alpha=weights[1])
        gradient_NV.scatter_(-1, labels_N1, push_N1).mul_(temperature)
    return value, scatter_rows(gradient_NV, student_TV, mask_T)


def _split(logits_NV: Tensor, labels_N1: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (label, all others), ``[N, 2]``, and of each other among the others.

    The second is 0 at the label, where it means nothing.
    """
    others_NV = logits_NV.scatter(-1, labels_N1, -torch.inf)
    sum_N1 = others_NV.logsumexp(-1, keepdim=True)
    pair_N2 = torch.cat((logits_NV.gather(-1, labels_N1), sum_N1), -1).log_softmax(-1)
    return pair_N2, (others_NV - sum_N1).scatter(-1, labels_N1, 0.0)


def minifinetuning(
    student_TV: Tensor,
    teacher_TV: Tensor,
    mask_T: Tensor,
    labels_T: Tensor,
    *,
    threshold: float,
    temperature: float,
) -> Tensor:
    """Sum of D_KL(corrected teacher || student) at ``temperature``, times its square."""
    log_q, log_p = log_probs(student_TV, teacher_TV, mask_T, temperature)
    target_NV = corrected(log_p.exp_(), valid(labels_T, mask_T).unsqueeze(-1), threshold)
    return temperature**2 * F.kl_div(log_q, target_NV, reduction="sum")


def minifinetuning_gradient(
    student_TV: Tensor,
    teacher_TV: Tensor,
    mask_T: Tensor,
    labels_T: Tensor,
    *,
    threshold: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Return ``minifinetuning`` and its gradient, temperature times (q - corrected teacher)."""
    with torch.no_grad():
        log_q, log_p = log_probs(student_TV, teacher_TV, mask_T, temperature)
        target_NV = corrected(log_p.exp_(), valid(labels_T, mask_T).unsqueeze(-1), threshold)
        value = -(temperature**2) * torch.special.entr(target_NV).addcmul_(target_NV, log_q).sum()
        gradient_NV = log_q.exp_().sub_(target_NV).mul_(temperature)
    return value, scatter_rows(gradient_NV, student_TV, mask_T)


def corrected(p_NV: Tensor, labels_N1: Tensor, threshold: float) -> Tensor:
    """Mix so much of the label into ``p_NV``, in place, that it leads by ``threshold``.

    Where another token is the teacher's likeliest, the label ends ``threshold`` above that token;
    where the label is, it gains ``threshold``. No probability passes 1.
    """
    p_label = p_NV.gather(-1, labels_N1)
    p_peak, peak_N1 = p_NV.max(-1, keepdim=True)
    lead = p_peak - p_label
    room = (1 - p_label).clamp_min_(torch.finfo(p_NV.dtype).tiny)
    share = torch.where(
        peak_N1 == labels_N1, threshold / room, (lead + threshold) / (1 + lead)
    ).clamp_max_(1.0)
    return p_NV.mul_(1 - share).scatter_add_(-1, labels_N1, share)
