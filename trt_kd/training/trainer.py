"""The trainers, one for each way in which a teacher is had, on ModelOpt's Hugging Face trainers.

Shape suffixes: B sequences, L positions, T valid tokens, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from modelopt.torch.distill.plugins.huggingface import KDTrainer
from modelopt.torch.opt.plugins import ModelOptHFTrainer
from torch import Tensor, nn

from trt_kd.teachers.cache import Cache
from trt_kd.training import packing
from trt_kd.training.alignment import AlignedHead, aligned
from trt_kd.training.head import TeacherRows, linear_head
from trt_kd.training.objective import ObjectiveTrainer
from trt_kd.training.sharding import gathered


class DistillTrainer(ObjectiveTrainer, KDTrainer):  # type: ignore[misc]
    """Trains on the objective with a teacher that runs beside the student."""

    _teacher_head: AlignedHead | None = None

    def _mixed_in(self) -> Any:
        """See the base class."""
        if self.rollout is None or not self.rollout.teacher_mix:
            return None
        self._ensure_teacher_prepared()
        return self._get_unwrapped_teacher()

    def _prepare_model(self, model: nn.Module) -> nn.Module:
        """Place the teacher; where processes hold it whole there are no gradients to average."""
        if self.accelerator.num_processes == 1 or self.is_fsdp_enabled:
            return super()._prepare_model(model)  # type: ignore[no-any-return]
        return self.accelerator.prepare_model(model, evaluation_mode=True)  # type: ignore[no-any-return]

    def _teacher_rows(
        self, tokens_BL: Tensor, mask_BL: Tensor
    ) -> Callable[[slice], TeacherRows] | None:
        """Run the teacher's trunk once; its head follows piece by piece."""
        self._ensure_teacher_prepared()
        with self._teacher_liger_identity_lm_head(), self._precision():
            outputs = self._compute_teacher_outputs(packing.inputs(tokens_BL, self.end))
        hidden_TD = outputs.logits[:, :-1][mask_BL]
        if self._teacher_head is None:
            self._teacher_head = self._aligned_head(self._get_unwrapped_teacher())
        head = self._teacher_head
        return lambda rows: self._logits(head, hidden_TD[rows])

    def _aligned_head(self, teacher: Any) -> AlignedHead:
        """The teacher's head with the student's columns."""
        columns = len(linear_head(self.accelerator.unwrap_model(self.model)).weight)
        head = gathered(teacher, linear_head)
        return aligned(head.cast(self.head_dtype), columns)

    def _logits(self, head: AlignedHead, hidden_TD: Tensor, share: float = 1.0) -> Tensor:
        """Logits of a teacher that has so large a share; the mass that is left out is noted."""
        logits_TV = head.logits(hidden_TD)
        if head.dropped is not None:
            self._add("dropped_teacher_mass", share * head.dropped_mass(hidden_TD, logits_TV))
        return logits_TV


class CachedTrainer(ObjectiveTrainer, ModelOptHFTrainer):  # type: ignore[misc]
    """Trains on the objective with a teacher's rows from disk; no teacher is run."""

    cache: Cache

    def _teacher_rows(
        self, tokens_BL: Tensor, mask_BL: Tensor
    ) -> Callable[[slice], TeacherRows] | None:
        """Read the rows of the whole blocks of this micro-batch."""
        blocks = tokens_BL.cpu().numpy()
        top = self.cache.rows(blocks)[mask_BL.flatten().cpu()]
        if self.cache.drops:  # of all its blocks: every process logs the same names
            dropped_B = torch.from_numpy(self.cache.dropped(blocks))
            dropped_B1 = dropped_B.to(mask_BL.device).unsqueeze(-1)
            self._add("dropped_teacher_mass", (dropped_B1 * mask_BL).sum())
        return top.to(tokens_BL.device).__getitem__


class TaskTrainer(ObjectiveTrainer, ModelOptHFTrainer):  # type: ignore[misc]
    """Trains on hard labels alone; there is no teacher and none is run."""
