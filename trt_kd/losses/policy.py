"""Policy gradient of the reverse KL between whole texts, token by token.

With a student q, a teacher p and a text y that was sampled, MiniLLM (Gu et al. 2024,
arXiv:2306.08543, equation 8) descends along

    sum_t w_t (grad KL(q_t || p_t) - R_(t+1) grad log q_t(y_t)),

where ``R_(t+1)`` is the sum of log p/q over the tokens after t (their mean, where lengths are
normalised) and ``w_t`` is how likely the student finds y_t by how likely it was to be sampled.

Shape suffixes: T valid tokens, V vocabulary, B sequences, K positions that predict.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trt_kd.losses.maths import log_probs, through_softmax


@dataclass(frozen=True)
class JudgedRows:
    """A teacher's logits at sampled tokens, and what became of the text after each of them."""

    logits: Tensor
    """``[T, V]``."""
    weights: Tensor
    """Importance ``[T]``."""
    outlooks: Tensor
    """R ``[T]``, in nats."""
    single_step: bool
    """Whether a token's own KL is taken exactly; else ``outlooks`` begin with the token itself."""

    def __getitem__(self, rows: slice) -> "JudgedRows":
        """The same for a slice of the tokens."""
        return JudgedRows(
            self.logits[rows], self.weights[rows], self.outlooks[rows], self.single_step
        )

    def to(self, dtype: torch.dtype) -> "JudgedRows":
        """The same in ``dtype``."""
        logits, weights, outlooks_T = (
            x.to(dtype) for x in (self.logits, self.weights, self.outlooks)
        )
        return JudgedRows(logits, weights, outlooks_T, self.single_step)


@torch.no_grad()
def policy_gradient(
    student_TV: Tensor, judged: JudgedRows, labels_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Return an estimate of the reverse KL of the texts, in nats, and its gradient.

    The value is the weighted sum of the tokens' KL (of their log q/p, where it is not taken
    exactly): it is what the gradient reduces, and not a function whose derivative that is.

    Args:
        student_TV: logits ``[T, V]``.
        judged: the teacher's side.
        labels_T: the sampled tokens, int64.
    """
    mask_T = torch.ones_like(labels_T, dtype=torch.bool)
    log_q, log_p = log_probs(student_TV, judged.logits, mask_T, 1.0)
    ratio_TV = log_p.neg_().add_(log_q)
    q = log_q.exp_()
    labels_T1, weights_T1 = labels_T.unsqueeze(-1), judged.weights.unsqueeze(-1)
    drawn_T1 = weights_T1 * judged.outlooks.unsqueeze(-1)
    if judged.single_step:
        weighted = ratio_TV.mul_(q)
        value = (weights_T1 * weighted).sum()
        gradient_TV = through_softmax(q, weighted).mul_(weights_T1).addcmul_(q, drawn_T1)
    else:
        value = (weights_T1 * ratio_TV.gather(-1, labels_T1)).sum()
        gradient_TV = q.mul_(drawn_T1)
    return value, gradient_TV.scatter_add_(-1, labels_T1, -drawn_T1)


def outlooks(gains_BK: Tensor, mask_BK: Tensor, *, own: bool, length_normalised: bool) -> Tensor:
    """What the valid tokens after each one gain, ``[B, K]``; 0 where there is none.

    Args:
        gains_BK: log p/q of every token, in nats; anything finite where ``mask_BK`` is False.
        mask_BK: valid tokens, bool.
        own: whether a token's own gain is among them.
        length_normalised: whether the sum is divided by their number, so that early tokens do not
            count more than late ones. (The paper divides by one less.)
    """
    sums_BK = _from_here(gains_BK * mask_BK)
    counts_BK = _from_here(mask_BK.to(gains_BK.dtype))
    if not own:
        sums_BK, counts_BK = _next(sums_BK), _next(counts_BK)
    return sums_BK / counts_BK.clamp(min=1) if length_normalised else sums_BK


def importance(log_q_T: Tensor, log_p_T: Tensor, teacher_mix: float) -> Tensor:
    """Q over the mixture of teacher and student that was sampled from, at most 1/(1 - mix).

    The paper's weight of a token is the product over all tokens so far; like its authors, and for
    less variance, this is the token's own factor.
    """
    ratio_T = (log_p_T - log_q_T).exp()
    return 1.0 / (teacher_mix * ratio_T + (1.0 - teacher_mix))


def _from_here(values_BK: Tensor) -> Tensor:
    return values_BK.flip(1).cumsum(1).flip(1)


def _next(values_BK: Tensor) -> Tensor:
    return torch.cat((values_BK[:, 1:], torch.zeros_like(values_BK[:, :1])), 1)
