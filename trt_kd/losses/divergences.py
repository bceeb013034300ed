"""Skewed KL, total variation, alpha-beta, adaptive KL, sorted gaps between rows of logits.

As in ``maths``, ``x_gradient`` returns what ``x`` returns and the gradient in closed form; p is
the teacher, q the student.

Shape suffixes: T tokens, V vocabulary, U another one, N valid tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from trt_kd.losses.maths import (
    log_mixture,
    log_probs,
    scatter_rows,
    softened,
    through_softmax,
    valid,
    wide,
)

HEAD_TOKENS = 64
"""Likeliest tokens among which the head is looked for first; then eight times as many."""


def skewed_forward_kl(
    student_TV: Tensor, teacher_TV: Tensor, mask_T: Tensor, *, alpha: float, temperature: float
) -> Tensor:
    """Sum of D_KL(p || alpha p + (1 - alpha) q) at ``temperature``, times its square."""
    log_q, log_p = log_probs(student_TV, teacher_TV, mask_T, temperature)
    log_m = log_mixture(log_p, log_q, alpha)
    return temperature**2 * F.kl_div(log_m, log_p, reduction="sum", log_target=True)


def skewed_forward_kl_gradient(
    student_TV: Tensor, teacher_TV: Tensor, mask_T: Tensor, *, alpha: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return ``skewed_forward_kl`` and its gradient; by q it is -(1 - alpha) p/m."""
    with torch.no_grad():
        log_q, log_p = log_probs(student_TV, teacher_TV, mask_T, temperature)
        p = log_p.exp()
        ratio = log_p.sub_(log_mixture(log_p, log_q, alpha))
        value = temperature**2 * torch.dot(p.flatten(), ratio.flatten())
        q = log_q.exp_()
        weighted = ratio.exp_().mul_(q)
        gradient_NV = through_softmax(q, weighted).mul_((alpha - 1) * temperature)
    return value, scatter_rows(gradient_NV, student_TV, mask_T)


def skewed_reverse_kl(
    student_TV: Tensor, teacher_TV: Tensor, mask_T: Tensor, *, alpha: float, temperature: float
) -> Tensor:
    """Sum of D_KL(q || alpha q + (1 - alpha) p) at ``temperature``, times its square."""
    log_q, log_p = log_probs(student_TV, teacher_TV, mask_T, temperature)
    log_m = log_mixture(log_q, log_p, alpha)
    return temperature**2 * F.kl_div(log_m, log_q, reduction="sum", log_target=True)


def skewed_reverse_kl_gradient(
    student_TV: Tensor, teacher_TV: Tensor, mask_T: Tensor, *, alpha: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return ``skewed_reverse_kl`` and its gradient; by q it is log q/m - alpha q/m."""
    with torch.no_grad():
        log_q, log_p = log_probs(student_TV, teacher_TV, mask_T, temperature)
        ratio = log_mixture(log_q, log_p, alpha).neg_().add_(log_q)
        q = log_q.exp_()
        value = temperature**2 * torch.dot(q.flatten(), ratio.flatten())
        weighted = ratio.sub_(ratio.exp(), alpha=alpha).mul_(q)
        gradient_NV = through_softmax(q, weighted).mul_(temperature)
    return value, scatter_rows(gradient_NV, student_TV, mask_T)


def total_variation(student_TV: Tensor, teacher_TV: Tensor, mask_T: Tensor) -> Tensor:
    """Sum of half of |p - q|, a number from 0 to 1 per token."""
    student, teacher = softened(student_TV, teacher_TV, mask_T, 1.0)
    return 0.5 * (student.softmax(-1) - teacher.softmax(-1)).abs().sum()


def total_variation_gradient(
    student_TV: Tensor, teacher_TV: Tensor, mask_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ``total_variation`` and a subgradient; by q it is half the sign of q - p.

    Where q = p every number from -1/2 to 1/2 is one; 0 is taken, as autograd does.
    """
    with torch.no_grad():
        student, teacher = softened(student_TV, teacher_TV, mask_T, 1.0)
        q = student.softmax(-1)
        gap = teacher.softmax(-1).neg_().add_(q)
        value = 0.5 * gap.abs().sum()
        gradient_NV = through_softmax(q, gap.sign_().mul_(q)).mul_(0.5)
    return value, scatter_rows(gradient_NV, student_TV, mask_T)


def alpha_beta(
    student_TV: Tensor,
    teacher_TV: Tensor,
    mask_T: Tensor,
    *,
    exponents: tuple[float, float],
    temperature: float,
) -> Tensor:
    """Sum of the alpha-beta divergence at ``temperature``, times its square."""
    log_q, log_p = log_probs(student_TV, teacher_TV, mask_T, temperature)
    a, b = exponents
    own = (a * ((a + b) * log_p).exp() + b * ((a + b) * log_q).exp()) / (a + b)
    return temperature**2 * (own - (a * log_p + b * log_q).exp()).sum() / (a * b)


def alpha_beta_gradient(
    student_TV: Tensor,
    teacher_TV: Tensor,
    mask_T: Tensor,
    *,
    exponents: tuple[float, float],
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Return ``alpha_beta`` and its gradient; by q it is q^(b-1) (q^a - p^a) / a."""
    a, b = exponents
    with torch.no_grad():
        log_q, log_p = log_probs(student_TV, teacher_TV, mask_T, temperature)
        cross = log_p.mul(a).add_(log_q, alpha=b).exp_()
        of_p = log_p.mul_(a + b).exp_()
        of_q = log_q.mul(a + b).exp_()
        own = of_p.mul_(a / (a + b)).add_(of_q, alpha=b / (a + b))
        value = temperature**2 * own.sub_(cross).sum() / (a * b)
        weighted = of_q.sub_(cross)
        gradient_NV = through_softmax(log_q.exp_(), weighted).mul_(temperature / a)
    return value, scatter_rows(gradient_NV, student_TV, mask_T)


def adaptive_kl(
    student_TV: Tensor, teacher_TV: Tensor, mask_T: Tensor, *, head: float, temperature: float
) -> Tensor:
    """Sum of w D_KL(p || q) + (1 - w) D_KL(q || p), w held constant by the gradient."""
    log_q, log_p = log_probs(student_TV, teacher_TV, mask_T, temperature)
    with torch.no_grad():
        weight_N1 = forward_weight(log_q.exp(), log_p.exp(), head)
    forward_NV = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    reverse_NV = F.kl_div(log_p, log_q, reduction="none", log_target=True)
    return temperature**2 * (weight_N1 * forward_NV + (1 - weight_N1) * reverse_NV).sum()


def adaptive_kl_gradient(
    student_TV: Tensor, teacher_TV: Tensor, mask_T: Tensor, *, head: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return ``adaptive_kl`` and its gradient, both directions' gradients in the same mixture."""
    with torch.no_grad():
        log_q, log_p = log_probs(student_TV, teacher_TV, mask_T, temperature)
        p = log_p.exp()
        ratio = log_p.neg_().add_(log_q)
        q = log_q.exp_()
        weight_N1 = forward_weight(q, p, head)
        forward_N1 = -(p * ratio).sum(-1, keepdim=True)
        weighted = ratio.mul_(q)
        reverse_N1 = weighted.sum(-1, keepdim=True)
        value = temperature**2 * torch.lerp(reverse_N1, forward_N1, weight_N1).sum()
        gradient_NV = through_softmax(q, weighted).mul_(1 - weight_N1)
        gradient_NV.addcmul_(q.sub_(p), weight_N1).mul_(temperature)
    return value, scatter_rows(gradient_NV, student_TV, mask_T)


def forward_weight(q_NV: Tensor, p_NV: Tensor, head: float) -> Tensor:
    """Weight of forward KL, ``[N, 1]``: the part of |p - q| that lies in the teacher's head.

    The head is the teacher's likeliest tokens whose mass adds up to at most ``head``, and always
    the first. 0 where p = q.
    """
    gap_NV = (p_NV - q_NV).abs()
    whole_N1 = gap_NV.sum(-1, keepdim=True)
    in_head_N1 = torch.zeros_like(whole_N1)
    left_N = torch.arange(len(p_NV), device=p_NV.device)
    count = HEAD_TOKENS
    while len(left_N):
        count = min(count, p_NV.shape[-1])
        rows = slice(None) if len(left_N) == len(p_NV) else left_N
        in_head_N1[rows], open_N = _head_sum(gap_NV[rows], p_NV[rows], head, count)
        left_N = left_N[open_N] if count < p_NV.shape[-1] else left_N[:0]
        count *= 8
    return in_head_N1.div_(whole_N1.clamp_min_(torch.finfo(whole_N1.dtype).tiny)).clamp_max_(1.0)


def _head_sum(gap_NV: Tensor, p_NV: Tensor, head: float, count: int) -> tuple[Tensor, Tensor]:
    """Gap summed over the head within the ``count`` likeliest tokens; whether it may go on."""
    top_NK, ids_NK = p_NV.topk(count)
    inside_NK = top_NK.cumsum_(-1) <= head
    inside_NK[:, 0] = True
    return (gap_NV.gather(-1, ids_NK) * inside_NK).sum(-1, keepdim=True), inside_NK[:, -1]


def sorted_gap(student_TV: Tensor, teacher_TU: Tensor, mask_T: Tensor) -> Tensor:
    """Sum over ranks of |p - q|, probabilities sorted from large to small, zeros after the last.

    The vocabularies, of V and U tokens, may differ.
    """
    q = wide(valid(student_TV, mask_T)).softmax(-1)
    gap, _ = _rank_gap(q, teacher_TU, mask_T)
    return gap.abs().sum()


def sorted_gap_gradient(
    student_TV: Tensor, teacher_TU: Tensor, mask_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ``sorted_gap`` and a subgradient; by q it is the sign of its own rank's gap."""
    with torch.no_grad():
        q = wide(valid(student_TV, mask_T)).softmax(-1)
        gap, order = _rank_gap(q, teacher_TU, mask_T)
        value = gap.abs().sum()
        signs = gap[:, : q.shape[1]].sign()
        weighted = torch.empty_like(q).scatter_(-1, order, signs).mul_(q)
        gradient_NV = through_softmax(q, weighted)
    return value, scatter_rows(gradient_NV, student_TV, mask_T)


def _rank_gap(q_NV: Tensor, teacher_TU: Tensor, mask_T: Tensor) -> tuple[Tensor, Tensor]:
    """By rank q - p, as wide as the larger vocabulary, and q's token at each rank ``[N, V]``."""
    p_NU = wide(valid(teacher_TU, mask_T).detach()).softmax(-1)
    ranked_NV, order_NV = q_NV.sort(-1, descending=True)
    ranked_NU = p_NU.sort(-1, descending=True).values
    more = ranked_NU.shape[1] - ranked_NV.shape[1]
    return F.pad(ranked_NV, (0, max(0, more))) - F.pad(ranked_NU, (0, max(0, -more))), order_NV
