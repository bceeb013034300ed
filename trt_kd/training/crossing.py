"""Training with a teacher that reads the same text in other tokens.

Shape suffixes: B sequences, K positions that predict, T valid tokens of the student, N of them at
which both have read the same bytes, S the teacher's tokens, D its hidden size, U its vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trt_kd.teachers.gapped import GappedRows
from trt_kd.teachers.spans import Reading, Translator
from trt_kd.training.head import Head, TeacherRows, linear_head
from trt_kd.training.sharding import gathered
from trt_kd.training.trainer import DistillTrainer


class CrossTrainer(DistillTrainer):
    """Trains on the objective where the teacher's tokens end with the student's."""

    one_vocabulary = False
    translator: Translator
    _own_head: Head | None = None

    def _teacher_rows(
        self, tokens_BL: Tensor, mask_BL: Tensor
    ) -> Callable[[slice], TeacherRows] | None:
        """Run the teacher's trunk on its own tokens; its head follows piece by piece."""
        self._ensure_teacher_prepared()
        readings = [self.translator.read(row) for row in tokens_BL.tolist()]
        longest = max(len(one.ids) for one in readings)
        ids = [one.ids + one.ids[-1:] * (longest - len(one.ids)) for one in readings]
        ids_BS = torch.tensor(ids, device=tokens_BL.device)
        with self._teacher_liger_identity_lm_head(), self._precision():
            outputs = self._compute_teacher_outputs({"input_ids": ids_BS, "use_cache": False})
        place_BK = _places(readings, mask_BL)
        known_BK = mask_BL & (place_BK >= 0)
        row_N = known_BK.nonzero()[:, 0]
        hidden_ND = outputs.logits[row_N, place_BK[known_BK]]
        known_T = known_BK[mask_BL]
        self._add("aligned_share", known_T.sum())
        if self._own_head is None:
            teacher = self._get_unwrapped_teacher()
            self._own_head = gathered(teacher, linear_head).cast(self.head_dtype)
        head, number_T = self._own_head, known_T.cumsum(0) - 1

        def rows(part: slice) -> GappedRows:
            known = known_T[part]
            shape = (len(known), len(head.weight))
            logits_TU = torch.zeros(shape, dtype=self.head_dtype, device=known.device)
            logits_TU[known] = head.logits(hidden_ND[number_T[part][known]])
            return GappedRows(logits_TU, known)

        return rows


def _places(readings: Sequence[Reading], mask_BK: Tensor) -> Tensor:
    """The teacher's position for each of the student's, int64 ``[B, K]``, -1 where it has none."""
    rows = []
    for one in readings:
        row = [-1] * mask_BK.shape[1]
        for here, there in one.pairs:
            if here < len(row):
                row[here] = there
        rows.append(row)
    return torch.tensor(rows, device=mask_BK.device)
