"""Divergences between rows of logits, as pure functions of tensors.

Shape suffixes: T tokens, V vocabulary, N valid tokens.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(student_TV: Tensor, labels_T: Tensor, mask_T: Tensor) -> Tensor:
    """Negative log-likelihood of ``labels_T`` (int64), summed over valid tokens, in nats."""
    student_NV = wide(valid(student_TV, mask_T))
    return F.cross_entropy(student_NV, labels_T[mask_T], reduction="sum")


def cross_entropy_gradient(
    student_TV: Tensor, labels_T: Tensor, mask_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ``cross_entropy`` and its gradient, softmax minus one-hot, by ``student_TV``."""
    log_q_NV = wide(valid(student_TV, mask_T)).log_softmax(-1)
    labels_N1 = valid(labels_T, mask_T).unsqueeze(-1)
    value = -log_q_NV.gather(-1, labels_N1).sum()
    gradient_NV = log_q_NV.exp_()
    gradient_NV.scatter_add_(-1, labels_N1, -torch.ones_like(labels_N1, dtype=gradient_NV.dtype))
    return value, scatter_rows(gradient_NV, student_TV, mask_T)


def forward_kl(
    student_TV: Tensor, teacher_TV: Tensor, mask_T: Tensor, temperature: float
) -> Tensor:
    """Sum of D_KL(teacher || student) at ``temperature``, times its square."""
    log_q, log_p = log_probs(student_TV, teacher_TV, mask_T, temperature)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def forward_kl_gradient(
    student_TV: Tensor, teacher_TV: Tensor, mask_T: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return ``forward_kl`` and its gradient, temperature times (q - p), by ``student_TV``."""
    with torch.no_grad():
        log_q, log_p = log_probs(student_TV, teacher_TV, mask_T, temperature)
        p = log_p.exp()
        value = temperature**2 * torch.dot(p.flatten(), (log_p.sub_(log_q)).flatten())
        gradient_NV = log_q.exp_().sub_(p).mul_(temperature)
    return value, scatter_rows(gradient_NV, student_TV, mask_T)


def reverse_kl(
    student_TV: Tensor, teacher_TV: Tensor, mask_T: Tensor, temperature: float
) -> Tensor:
    """Sum of D_KL(student || teacher) at ``temperature``, times its square."""
    log_q, log_p = log_probs(student_TV, teacher_TV, mask_T, temperature)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="sum", log_target=True)


def jensen_shannon(
    student_TV: Tensor, teacher_TV: Tensor, mask_T: Tensor, *, beta: float, temperature: float
) -> Tensor:
    """Sum of beta D_KL(p || m) + (1 - beta) D_KL(q || m) with m = beta p + (1 - beta) q."""
    log_q, log_p = log_probs(student_TV, teacher_TV, mask_T, temperature)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    to_teacher = F.kl_div(log_m, log_p, reduction="sum", log_target=True)
    to_student = F.kl_div(log_m, log_q, reduction="sum", log_target=True)
    return temperature**2 * (beta * to_teacher + (1 - beta) * to_student)


def log_probs(
    student_TV: Tensor, teacher_TV: Tensor, mask_T: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the valid rows in at least float32; the teacher is detached.

    Raises:
        ValueError: if the two logits differ in shape.
    """
    if student_TV.shape != teacher_TV.shape:
        raise ValueError(
            f"student logits {tuple(student_TV.shape)} and teacher logits "
            f"{tuple(teacher_TV.shape)} differ: token KD needs one tokenizer for both"
        )
    student = wide(valid(student_TV, mask_T))
    teacher = wide(valid(teacher_TV, mask_T).detach())
    if temperature != 1.0:
        student, teacher = student / temperature, teacher / temperature
    return student.log_softmax(-1), teacher.log_softmax(-1)


def valid(rows_TV: Tensor, mask_T: Tensor) -> Tensor:
    """Rows that the mask marks as valid, without a copy where all are."""
    return rows_TV if bool(mask_T.all()) else rows_TV[mask_T]


def wide(logits: Tensor) -> Tensor:
    """Logits in at least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def scatter_rows(gradient_NV: Tensor, like_TV: Tensor, mask_T: Tensor) -> Tensor:
    """Put the gradient of the valid rows back among zeros, in the dtype of ``like_TV``."""
    if gradient_NV.shape == like_TV.shape:
        return gradient_NV.to(like_TV.dtype)
    gradient_TV = torch.zeros_like(like_TV)
    gradient_TV[mask_T] = gradient_NV.to(like_TV.dtype)
    return gradient_TV
