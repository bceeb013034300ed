"""Training with several teachers at once.

Shape suffixes: B sequences, L positions, T valid tokens, N teachers, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trt_kd.losses.maths import wide
from trt_kd.teachers.mixing import MixedRows, Mixture
from trt_kd.training import packing
from trt_kd.training.alignment import AlignedHead
from trt_kd.training.head import TeacherRows, pieces, rows_at_a_time
from trt_kd.training.trainer import DistillTrainer


class SeveralTrainer(DistillTrainer):
    """Trains on the objective with teachers that are mixed row by row."""

    mixture: Mixture
    _prepared: list[Any] | None = None
    _heads: list[AlignedHead]

    def _teacher_rows(
        self, tokens_BL: Tensor, mask_BL: Tensor
    ) -> Callable[[slice], TeacherRows] | None:
        """Run every trunk once; the heads follow piece by piece."""
        if self._prepared is None:
            self._prepared = [self._prepare_model(model) for model in self.mixture.models]
            unwrapped = [self.accelerator.unwrap_model(model) for model in self._prepared]
            self._heads = [self._aligned_head(model) for model in unwrapped]
        hiddens_NTD = [self._hidden(model, tokens_BL)[:, :-1][mask_BL] for model in self._prepared]
        if self.mixture.combine == "best":
            labels_T = tokens_BL[:, 1:][mask_BL]
            block_T = mask_BL.nonzero()[:, 0]
            losses_NB = torch.stack(
                [
                    _sums_by_block(task_losses(head, hidden, labels_T), block_T, len(tokens_BL))
                    for head, hidden in zip(self._heads, hiddens_NTD, strict=True)
                ]
            )
            choice_T = losses_NB.argmin(0)[block_T]
            return lambda rows: self._chosen(hiddens_NTD, choice_T, rows)
        return lambda rows: self._mixed(hiddens_NTD, rows)

    def _hidden(self, model: Any, tokens_BL: Tensor) -> Tensor:
        """Last hidden states ``[B, L, D]``: the model's output with its head left out."""
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        forward = head.forward
        head.forward = lambda hidden_BLD: hidden_BLD
        try:
            with torch.no_grad():
                output = model(**packing.inputs(tokens_BL, self.end))
        finally:
            head.forward = forward
        return output.logits  # type: ignore[no-any-return]

    def _mixed(self, hiddens_NTD: list[Tensor], rows: slice) -> MixedRows:
        shares = self.mixture.shares
        each = zip(self._heads, hiddens_NTD, shares, strict=True)
        parts = [self._logits(head, hidden[rows], share) for head, hidden, share in each]
        return MixedRows(parts, shares, of_logits=self.mixture.combine == "logits")

    def _chosen(self, hiddens_NTD: list[Tensor], choice_T: Tensor, rows: slice) -> Tensor:
        """Logits of the chosen teacher for every row; the others' heads do not run on it."""
        wanted_T = choice_T[rows]
        shape = (len(wanted_T), self._heads[0].columns)
        logits_TV = torch.empty(shape, dtype=self.head_dtype, device=choice_T.device)
        for number, (head, hidden_TD) in enumerate(zip(self._heads, hiddens_NTD, strict=True)):
            mine_T = wanted_T == number
            if bool(mine_T.any()):
                logits_TV[mine_T] = self._logits(head, hidden_TD[rows][mine_T])
        return logits_TV


def task_losses(head: AlignedHead, hidden_TD: Tensor, labels_T: Tensor) -> Tensor:
    """Cross-entropy ``[T]`` of a teacher with the true next tokens, some logits at a time."""
    step = rows_at_a_time(head.columns, hidden_TD.device)
    parts = [
        F.cross_entropy(wide(head.logits(hidden_TD[rows])), labels_T[rows], reduction="none")
        for rows in pieces(len(hidden_TD), step)
    ]
    return torch.cat(parts)


def _sums_by_block(values_T: Tensor, block_T: Tensor, blocks: int) -> Tensor:
    """Sum ``[B]`` of the values of every block."""
    return values_T.new_zeros(blocks).index_add_(0, block_T, values_T)
