"""What a monitor measures: the student on held-out text, and gradients layer by layer.

Shape suffixes: T tokens, D hidden size, V vocabulary.
"""

import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trt_kd.losses.kl import ForwardKL
from trt_kd.losses.policy import JudgedRows
from trt_kd.losses.top_k import TopK
from trt_kd.teachers.gapped import GappedRows
from trt_kd.training.head import Head, TeacherRows
from trt_kd.training.optimizer_state import whole

LOGITS_BYTES = 64 << 20
"""Size of the float32 logits that exist at a time, of student and teacher each."""

_LAYER = re.compile(r"\.(\d+)\.")


@torch.no_grad()
def heldout_sums(
    hidden_TD: Tensor,
    head: Head,
    labels_T: Tensor,
    teacher: Callable[[slice], TeacherRows] | None,
) -> Tensor:
    """Sums over T tokens, float64 ``[4]``: task loss, entropy, divergence, agreement.

    Task loss: cross-entropy with the true next tokens; entropy: the student's; divergence: forward
    KL from the teacher, all in nats; agreement: tokens at which both find the same token likeliest.
    Without a teacher the last two are 0. Of a teacher known by its top k the divergence is that
    between k + 1 buckets, a lower bound.

    Args:
        hidden_TD: the student's hidden states.
        head: its output head, in the dtype of the matrix products.
        labels_T: the true next tokens, int64.
        teacher: gives the teacher's logits, or its top k, for a slice of the T tokens.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=hidden_TD.device)
    step = max(1, LOGITS_BYTES // (4 * len(head.weight)))
    for start in range(0, len(hidden_TD), step):
        rows = slice(start, start + step)
        logits_TV = head.logits(hidden_TD[rows]).float()
        log_q = logits_TV.log_softmax(-1)
        task = F.nll_loss(log_q, labels_T[rows], reduction="sum")
        entropy = -(log_q.exp() * log_q).sum()
        given = None if teacher is None else teacher(rows)[:]
        if isinstance(given, GappedRows | JudgedRows):
            raise ValueError(f"{type(given).__name__} have no divergence token by token")
        divergence, agreement = _beside(given, log_q)
        sums += torch.stack([x.double() for x in (task, entropy, divergence, agreement)])
    return sums


def _beside(teacher: Tensor | TopK | None, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of divergence and agreement over the rows of ``log_q`` ``[T, V]``."""
    likeliest_T = log_q.argmax(-1)
    if teacher is None:
        return log_q.new_zeros(()), log_q.new_zeros(())
    if isinstance(teacher, TopK):
        mask_T = torch.ones_like(likeliest_T, dtype=torch.bool)
        divergence, _ = ForwardKL().top_k_value_and_gradient(log_q, teacher, mask_T)
        best_T1 = teacher.logp.argmax(-1, keepdim=True)
        return divergence, (teacher.ids.gather(-1, best_T1)[:, 0] == likeliest_T).sum()
    log_p = teacher.float().log_softmax(-1)
    divergence = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return divergence, (log_p.argmax(-1) == likeliest_T).sum()


def layer_gradient_norms(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, float]:
    """Euclidean norm of the gradient by layer: ``layer_0`` and so on, ``outside_layers``.

    The layer is the first number in a parameter's name; embeddings, last norm and head have none.
    Where parameters are sharded, every process has to call it.
    """
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in parameters:
        if parameter.grad is not None:
            found = _LAYER.search(name)
            group = f"layer_{found[1]}" if found else "outside_layers"
            groups.setdefault(group, []).append(parameter.grad)
    return {
        name: float(whole(torch.stack(torch._foreach_norm(gradients)).norm()))
        for name, gradients in groups.items()
    }
