"""The vocabulary part of the objective, piece by piece, its gradient found on the way forward.

Logits are the largest tensors of a step: [tokens, vocabulary] in float32, several times over.
Here a group of rows goes through the heads as one matrix product; loss and gradient are found for
a few rows at a time, in float32, while these are in the cache, and the gradient takes the logits'
place. Only the gradients of hidden states and head weight are kept. The result is that of plain
autograd.

Shape suffixes: T tokens, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trt_kd.losses.base import KDLoss
from trt_kd.losses.maths import cross_entropy_by_token
from trt_kd.losses.policy import JudgedRows, policy_gradient
from trt_kd.losses.top_k import TopK
from trt_kd.teachers.gapped import GappedRows
from trt_kd.teachers.mixing import MixedRows

TeacherRows: TypeAlias = Tensor | TopK | MixedRows | GappedRows | JudgedRows
"""What a teacher says: dense logits, top-k log-probabilities, logits mixed on demand, logits of
some rows only, or of sampled tokens with what they led to."""
Piece: TypeAlias = Tensor | TopK | GappedRows | JudgedRows
"""The same for a few rows, as a loss sees it."""
GROUP_BYTES = {"cpu": 32 << 20}
"""Size of one group's logits, by device; student and teacher have one each. A smaller group costs
time, a larger one gains none."""
GROUP_BYTES_ELSEWHERE = 256 << 20
"""The same on a GPU, where large products are best."""
ROWS_BYTES = {"cpu": 1 << 20}
"""Size of the float32 logits that one pass of the loss sees, by device: a core's cache."""
ROWS_BYTES_ELSEWHERE = 256 << 20
"""The same on a GPU, where few large kernels are best."""


@dataclass(frozen=True)
class Labels:
    """The true next tokens, and how often each counts in the task term."""

    ids: Tensor
    """``[T]`` int64."""
    weights: Tensor | None = None
    """``[T]``; every token counts once without. The response term counts every token once."""
    tasks: Tensor | None = None
    """``[T]`` integers: what each is learnt for, counted from 1, where sums are taken apart."""
    task_count: int = 1
    """Numbers that ``tasks`` may hold."""

    def __getitem__(self, rows: slice) -> "Labels":
        """Those of a slice of the tokens."""
        weights, tasks = (None if x is None else x[rows] for x in (self.weights, self.tasks))
        return replace(self, ids=self.ids[rows], weights=weights, tasks=tasks)

    def sums(self, nats_T: Tensor) -> Tensor:
        """Sum of the tokens of every task, ``[S]``, of all in one where tasks are not apart."""
        if self.tasks is None:
            return nats_T.sum().unsqueeze(0)
        each = (nats_T[self.tasks == task] for task in range(1, self.task_count + 1))
        return torch.stack([part.sum() for part in each])


@dataclass(frozen=True)
class Objective:
    """``task_weight * cross-entropy + response_weight * loss``, both summed over tokens."""

    loss: KDLoss
    task_weight: float
    response_weight: float
    label_smoothing: float = 0.0

    def parts(
        self, student_TV: Tensor, teacher: Piece | None, labels: Labels
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Task sums ``[S]`` and response sum, unweighted, and the gradient of the weighted sum.

        A term of weight zero is not computed and is zero.
        """
        mask_T = torch.ones_like(labels.ids, dtype=torch.bool)
        task, response = student_TV.new_zeros(labels.task_count), student_TV.new_zeros(())
        gradient_TV: Tensor | None = None
        if self.response_weight:
            response, gradient_TV = self._response(student_TV, teacher, mask_T, labels.ids)
            gradient_TV = _scaled(gradient_TV, self.response_weight)
        if self.task_weight:
            nats_T, task_gradient_TV = cross_entropy_by_token(
                student_TV, labels.ids, mask_T, self.label_smoothing, labels.weights
            )
            task = labels.sums(nats_T)
            task_gradient_TV = _scaled(task_gradient_TV, self.task_weight)
            gradient_TV = (
                task_gradient_TV if gradient_TV is None else gradient_TV.add_(task_gradient_TV)
            )
        if gradient_TV is None:
            raise ValueError("an objective needs a weight that is not zero")
        return task, response, gradient_TV

    def weighed(self, *, task: float, response: float) -> "Objective":
        """The same terms with other weights."""
        return replace(self, task_weight=task, response_weight=response)

    def _response(
        self, student_TV: Tensor, teacher: Piece | None, mask_T: Tensor, labels_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        if teacher is None:
            raise ValueError("the response term needs a teacher's rows")
        if isinstance(teacher, TopK):
            return self.loss.top_k_value_and_gradient(student_TV, teacher, mask_T, labels_T)
        if isinstance(teacher, JudgedRows):
            return policy_gradient(student_TV, teacher, labels_T)
        if isinstance(teacher, GappedRows):
            return self.loss.value_and_gradient(student_TV, teacher.logits, teacher.known, labels_T)
        return self.loss.value_and_gradient(student_TV, teacher, mask_T, labels_T)


@dataclass(frozen=True)
class Head:
    """A linear map from hidden states to logits."""

    weight: Tensor
    """``[V, D]``."""
    bias: Tensor | None = None
    """``[V]``."""

    def __getitem__(self, rows: slice) -> "Head":
        """The head of these tokens alone."""
        return Head(self.weight[rows], None if self.bias is None else self.bias[rows])

    def cast(self, dtype: torch.dtype) -> "Head":
        """The same head in ``dtype``, detached."""
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        return Head(self.weight.detach().to(dtype), bias)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Logits in the head's dtype."""
        return F.linear(hidden_TD.to(self.weight.dtype), self.weight, self.bias)


def linear_head(model: Any) -> Head:
    """The model's output head."""
    head = model.get_output_embeddings()
    return Head(head.weight, getattr(head, "bias", None))


def head_loss(
    objective: Objective,
    hidden_TD: Tensor,
    head: Head,
    labels: Labels,
    *,
    teacher: Callable[[slice], TeacherRows] | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum (with gradient), task sum and response sum over all T tokens, in nats.

    The task sum is ``[S]``, one for every task, where the labels tell tasks apart, else ``[]``.

    Args:
        objective: the terms and their weights.
        hidden_TD: the student's hidden states of valid tokens.
        head: the student's output head.
        labels: the true next tokens.
        teacher: gives the teacher's logits, or its top k, for a slice of the T tokens.
        dtype: of the matrix products; sums and losses are at least float32.
    """
    work = _Work(objective, labels, teacher, dtype)
    total, task, response = _HeadLoss.apply(hidden_TD, head.weight, head.bias, work)  # type: ignore[no-untyped-call]
    return total, task, response


@dataclass(frozen=True)
class _Work:
    objective: Objective
    labels: Labels
    teacher: Callable[[slice], TeacherRows] | None
    dtype: torch.dtype


class _HeadLoss(torch.autograd.Function):
    """Gradients are found in ``forward``; ``backward`` only scales them, in place the last time."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, work: _Work
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(hidden_TD.device.type, enabled=False):
            sums, gradients = _accumulate(hidden_TD, Head(weight_VD, bias_V), work)
        ctx.save_for_backward(*gradients)
        task, response = sums[:-1], sums[-1]
        if work.labels.tasks is None:
            task = task[0]
        ctx.mark_non_differentiable(task, response)
        objective = work.objective
        total = objective.task_weight * task.sum() + objective.response_weight * response
        return total, task, response

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, total_gradient: Tensor, *_: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        again = torch._C._autograd._get_current_graph_task_keep_graph()  # retain_graph
        scale = torch.mul if again else Tensor.mul_
        hidden, weight, bias = (
            None if one is None else scale(one, total_gradient) for one in ctx.saved_tensors
        )
        return hidden, weight, bias, None


def _accumulate(
    hidden_TD: Tensor, head: Head, work: _Work
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor | None]]:
    """Sums of the terms and gradients of the weighted sum, over all chunks."""
    cast = head.cast(work.dtype)
    sums = work.labels.task_count + 1
    total = torch.zeros(sums, dtype=_wide(work.dtype), device=hidden_TD.device)
    hidden_gradient_TD = torch.empty_like(hidden_TD)
    new = torch.empty_like if len(hidden_TD) else torch.zeros_like
    weight_gradient_VD = new(head.weight)  # the first group fills it
    bias_gradient_V = None if head.bias is None else torch.zeros_like(head.bias)
    row_bytes = len(head.weight) * work.dtype.itemsize
    limit = GROUP_BYTES.get(hidden_TD.device.type, GROUP_BYTES_ELSEWHERE)
    for group in pieces(len(hidden_TD), limit // row_bytes):
        group_TD = hidden_TD[group].detach().to(work.dtype)
        teacher = None if work.teacher is None else work.teacher(group)
        student_TV = cast.logits(group_TD)
        total += _replace_by_gradient(student_TV, teacher, work.labels[group], work.objective)
        del teacher  # the products below need room
        hidden_gradient_TD[group] = (student_TV @ cast.weight).to(hidden_TD.dtype)
        for part in pieces(len(head.weight), limit // (4 * group_TD[0].nbytes)):
            product = student_TV[:, part].mT @ group_TD
            if group.start:
                weight_gradient_VD[part] += product
            else:
                weight_gradient_VD[part] = product
        if bias_gradient_V is not None:
            bias_gradient_V += student_TV.sum(0, dtype=total.dtype)
    return total, (hidden_gradient_TD, weight_gradient_VD, bias_gradient_V)


def _replace_by_gradient(
    student_TV: Tensor, teacher: TeacherRows | None, labels: Labels, objective: Objective
) -> Tensor:
    """Write the gradient over ``student_TV``; return the sums ``[S + 1]``, the response's last."""
    wide = _wide(student_TV.dtype)
    total = torch.zeros(labels.task_count + 1, dtype=wide, device=student_TV.device)
    for rows in pieces(len(student_TV), rows_at_a_time(student_TV.shape[1], student_TV.device)):
        teacher_rows = None if teacher is None else teacher[rows].to(wide)
        task, response, gradient = objective.parts(
            student_TV[rows].to(wide), teacher_rows, labels[rows]
        )
        student_TV[rows] = gradient
        total += torch.cat((task, response.unsqueeze(0)))
    return total


def rows_at_a_time(columns: int, device: torch.device) -> int:
    """Rows of float32 logits that one pass should see."""
    return ROWS_BYTES.get(device.type, ROWS_BYTES_ELSEWHERE) // (4 * columns)


def pieces(rows: int, size: int) -> list[slice]:
    """Cut ``rows`` into slices of ``size`` rows, at least one each."""
    step = max(1, size)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _scaled(gradient_TV: Tensor, weight: float) -> Tensor:
    return gradient_TV if weight == 1.0 else gradient_TV.mul_(weight)
