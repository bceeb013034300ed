"""Cross-entropy, KL and Jensen-Shannon between rows of logits, as pure functions of tensors.

A function named ``x_gradient`` returns what ``x`` returns and the gradient in closed form. With a
student q = softmax(z / tau) and a loss whose derivative by q_j is g_j, the gradient by z_j is
``q_j (g_j - sum_i q_i g_i) / tau`` (``through_softmax``); the square of tau that scales the loss
leaves a factor of tau.

Shape suffixes: T tokens, V vocabulary, N valid tokens.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(
    student_TV: Tensor, labels_T: Tensor, mask_T: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy with the smoothed ``labels_T`` (int64), summed over valid tokens, in nats.

    Label smoothing (Szegedy et al. 2016, arXiv:1512.00567): a label keeps 1 - ``label_smoothing``
    and all V tokens, itself included, share the rest evenly.

    Raises:
        ValueError: if ``label_smoothing`` is outside of 0 to 1.
    """
    _check_smoothing(label_smoothing)
    student_NV = wide(valid(student_TV, mask_T))
    labels_N = valid(labels_T, mask_T)
    return F.cross_entropy(student_NV, labels_N, reduction="sum", label_smoothing=label_smoothing)


def cross_entropy_gradient(
    student_TV: Tensor,
    labels_T: Tensor,
    mask_T: Tensor,
    label_smoothing: float = 0.0,
    weights_T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``cross_entropy`` and its gradient, softmax minus the smoothed one-hot.

    With ``weights_T`` every token counts so many times; each counts once without.

    Raises:
        ValueError: if ``label_smoothing`` is outside of 0 to 1.
    """
    nats_N, gradient_TV = cross_entropy_by_token(
        student_TV, labels_T, mask_T, label_smoothing, weights_T
    )
    return nats_N.sum(), gradient_TV


def cross_entropy_by_token(
    student_TV: Tensor,
    labels_T: Tensor,
    mask_T: Tensor,
    label_smoothing: float = 0.0,
    weights_T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same with the summands ``[N]`` of the valid tokens, weights included, not their sum.

    Raises:
        ValueError: if ``label_smoothing`` is outside of 0 to 1.
    """
    _check_smoothing(label_smoothing)
    with torch.no_grad():
        log_q_NV = wide(valid(student_TV, mask_T)).log_softmax(-1)
        labels_N1 = valid(labels_T, mask_T).unsqueeze(-1)
        nats_N1 = -log_q_NV.gather(-1, labels_N1)
        kept, share = 1.0 - label_smoothing, label_smoothing / log_q_NV.shape[-1]
        if label_smoothing:
            nats_N1 = kept * nats_N1 - share * log_q_NV.sum(-1, keepdim=True)
        gradient_NV = log_q_NV.exp_()
        if label_smoothing:
            gradient_NV.sub_(share)
        one_hot = torch.full_like(labels_N1, -kept, dtype=gradient_NV.dtype)
        gradient_NV.scatter_add_(-1, labels_N1, one_hot)
        if weights_T is not None:
            weights_N1 = valid(weights_T, mask_T).unsqueeze(-1).to(gradient_NV)
            nats_N1, gradient_NV = weights_N1 * nats_N1, gradient_NV.mul_(weights_N1)
    return nats_N1.squeeze(-1), scatter_rows(gradient_NV, student_TV, mask_T)


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


def reverse_kl_gradient(
    student_TV: Tensor, teacher_TV: Tensor, mask_T: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return ``reverse_kl`` and its gradient, temperature times q (log q/p - its mean)."""
    with torch.no_grad():
        log_q, log_p = log_probs(student_TV, teacher_TV, mask_T, temperature)
        ratio = log_p.neg_().add_(log_q)
        q = log_q.exp_()
        weighted = ratio.mul_(q)
        value = temperature**2 * weighted.sum()
        gradient_NV = through_softmax(q, weighted).mul_(temperature)
    return value, scatter_rows(gradient_NV, student_TV, mask_T)


def symmetric_kl(
    student_TV: Tensor, teacher_TV: Tensor, mask_T: Tensor, temperature: float
) -> Tensor:
    """Sum of the mean of forward and reverse KL at ``temperature``, times its square."""
    log_q, log_p = log_probs(student_TV, teacher_TV, mask_T, temperature)
    forward = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    reverse = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    return 0.5 * temperature**2 * (forward + reverse)


def symmetric_kl_gradient(
    student_TV: Tensor, teacher_TV: Tensor, mask_T: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return ``symmetric_kl`` and its gradient, the mean of both directions' gradients."""
    with torch.no_grad():
        log_q, log_p = log_probs(student_TV, teacher_TV, mask_T, temperature)
        p = log_p.exp()
        ratio = log_p.neg_().add_(log_q)
        q = log_q.exp_()
        forward = -torch.dot(p.flatten(), ratio.flatten())
        weighted = ratio.mul_(q)
        value = 0.5 * temperature**2 * (forward + weighted.sum())
        gradient_NV = through_softmax(q, weighted).add_(q).sub_(p).mul_(0.5 * temperature)
    return value, scatter_rows(gradient_NV, student_TV, mask_T)


def jensen_shannon(
    student_TV: Tensor, teacher_TV: Tensor, mask_T: Tensor, *, beta: float, temperature: float
) -> Tensor:
    """Sum of beta D_KL(p || m) + (1 - beta) D_KL(q || m) with m = beta p + (1 - beta) q."""
    log_q, log_p = log_probs(student_TV, teacher_TV, mask_T, temperature)
    log_m = log_mixture(log_p, log_q, beta)
    to_teacher = F.kl_div(log_m, log_p, reduction="sum", log_target=True)
    to_student = F.kl_div(log_m, log_q, reduction="sum", log_target=True)
    return temperature**2 * (beta * to_teacher + (1 - beta) * to_student)


def jensen_shannon_gradient(
    student_TV: Tensor, teacher_TV: Tensor, mask_T: Tensor, *, beta: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return ``jensen_shannon`` and its gradient.

    By q it is (1 - beta) log q/m: what m owes to q cancels between the two divergences.
    """
    with torch.no_grad():
        log_q, log_p = log_probs(student_TV, teacher_TV, mask_T, temperature)
        log_m = log_mixture(log_p, log_q, beta)
        p = log_p.exp()
        to_teacher = torch.dot(p.flatten(), log_p.sub_(log_m).flatten())
        ratio = log_m.neg_().add_(log_q)
        q = log_q.exp_()
        weighted = ratio.mul_(q)
        value = temperature**2 * (beta * to_teacher + (1 - beta) * weighted.sum())
        gradient_NV = through_softmax(q, weighted).mul_((1 - beta) * temperature)
    return value, scatter_rows(gradient_NV, student_TV, mask_T)


def log_mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """Logarithm of ``share`` a + (1 - ``share``) b, from logarithms; 0 < ``share`` < 1."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def through_softmax(q_NV: Tensor, weighted_NV: Tensor) -> Tensor:
    """Gradient by q's logits, written over ``weighted_NV``: q times the gradient by q."""
    return weighted_NV.addcmul_(q_NV, weighted_NV.sum(-1, keepdim=True), value=-1.0)


def log_probs(
    student_TV: Tensor, teacher_TV: Tensor, mask_T: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the valid rows in at least float32; the teacher is detached.

    Both are new tensors, so that callers may write over them.

    Raises:
        ValueError: if the two logits differ in shape.
    """
    student, teacher = softened(student_TV, teacher_TV, mask_T, temperature)
    return student.log_softmax(-1), teacher.log_softmax(-1)


def softened(
    student_TV: Tensor, teacher_TV: Tensor, mask_T: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Logits of the valid rows over ``temperature``, in at least float32; the teacher is detached.

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
    return student, teacher


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


def _check_smoothing(label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing {label_smoothing:g} is outside of 0 to 1")
