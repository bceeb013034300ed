"""The objective on ModelOpt's Hugging Face trainers.

Shape suffixes: B sequences, L positions, T valid tokens, D hidden size, V vocabulary.
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from modelopt.torch.distill.plugins.huggingface import IGNORE_INDEX, KDTrainer
from modelopt.torch.opt.plugins import ModelOptHFTrainer
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler

from trt_kd.errors import TrtKdError
from trt_kd.losses.top_k import TopK
from trt_kd.teachers.cache import Cache
from trt_kd.training import packing
from trt_kd.training.head import Head, Objective, head_loss
from trt_kd.training.sharding import PortableCheckpoints


class Blocks(Dataset[dict[str, Tensor]]):
    """Token blocks ``[count, L]`` in their order; after ``end`` another document begins."""

    def __init__(self, blocks: NDArray[np.int64], end: int | None = None) -> None:
        self.blocks = blocks
        self.end = end

    def __len__(self) -> int:
        """Count of blocks."""
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Token ids, and the same as labels; nothing predicts the first token, so it has none."""
        tokens_L = torch.tensor(self.blocks[index])
        labels_L = tokens_L.clone()
        labels_L[0] = IGNORE_INDEX
        if self.end is not None:
            labels_L[1:][tokens_L[:-1] == self.end] = IGNORE_INDEX
        return {"input_ids": tokens_L, "labels": labels_L}


class _ObjectiveTrainer(PortableCheckpoints):
    """What both trainers share: order of data, loss, log. Mixed in before a trainer of ModelOpt."""

    objective: Objective
    head_dtype: torch.dtype
    end: int | None

    def start(self, objective: Objective, head_dtype: torch.dtype, end: int | None = None) -> None:
        """Set what to minimize, the dtype of the head's products and what ends a document."""
        self.end = end
        self.objective = objective
        self.head_dtype = head_dtype
        self.model_accepts_loss_kwargs = True  # the token count comes as num_items_in_batch
        self._sums: dict[str, Tensor] = {}
        self._mark = time.monotonic()

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        """Read in order: every variant sees the same tokens at the same step."""
        return SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]

    def _get_lm_head(self, model: Any) -> nn.Module:
        return model.get_output_embeddings()  # type: ignore[no-any-return]

    def _teacher_rows(
        self, tokens_BL: Tensor, mask_BL: Tensor
    ) -> Callable[[slice], Tensor | TopK] | None:
        """Give the teacher's rows of a slice of the valid tokens, or None without a teacher."""
        return None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Weighted sum over the valid tokens of this micro-batch by the step's token count.

        Raises:
            ValueError: if outputs are asked for: the logits never exist as a whole.
        """
        if return_outputs:
            raise ValueError("this trainer trains only; evaluate the saved checkpoint")
        trainer: Any = self
        tokens_BL, labels_BK = inputs["input_ids"], inputs["labels"][:, 1:]
        mask_BK = labels_BK != IGNORE_INDEX
        with trainer._liger_identity_lm_head(), self._precision():
            hidden_BLD = model(**packing.inputs(tokens_BL, self.end)).logits
        teacher = self._teacher_rows(tokens_BL, mask_BK)
        student = trainer.accelerator.unwrap_model(trainer.model)

        def summed() -> tuple[Tensor, Tensor, Tensor]:
            return head_loss(
                self.objective,
                hidden_BLD[:, :-1][mask_BK],
                linear_head(student),
                labels_BK[mask_BK],
                teacher=teacher,
                dtype=self.head_dtype,
            )

        total, task, response = trainer._sharded_liger_compute(summed)
        count = mask_BK.sum() if num_items_in_batch is None else num_items_in_batch
        self._note("loss", total.detach() / count)
        if self.objective.task_weight:
            self._note("task_nats_per_token", task / count)
        if self.objective.response_weight:
            self._note("response_nats_per_token", response / count)
        return total / count * trainer.accelerator.num_processes  # type: ignore[no-any-return]

    def _precision(self) -> AbstractContextManager[Any]:
        """Autocast, with which accelerate wraps every model but a sharded one."""
        trainer: Any = self
        if trainer.is_fsdp_enabled and self.head_dtype == torch.bfloat16:
            return torch.autocast(trainer.args.device.type, torch.bfloat16)
        return nullcontext()

    def _note(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step's terms, unrounded, and its duration.

        Raises:
            TrtKdError: if a value is not finite.
        """
        trainer: Any = self
        if "loss" in logs:
            for name, value in self._sums.items():
                logs[name] = float(trainer.accelerator.reduce(value, reduction="sum"))
            self._sums = {}
            now = time.monotonic()
            logs["seconds"], self._mark = now - self._mark, now
            self._check(logs, trainer.state.global_step)
        super().log(logs, start_time)  # type: ignore[misc]

    @staticmethod
    def _check(logs: dict[str, float], step: int) -> None:
        for name, value in logs.items():
            if not math.isfinite(value):
                raise TrtKdError(
                    f"training diverged at step {step}: {name} is {value}",
                    hint="set a smaller learning_rate, more warmup_steps or precision: fp32",
                )


class DistillTrainer(_ObjectiveTrainer, KDTrainer):  # type: ignore[misc]
    """Trains on the objective with a teacher that runs beside the student."""

    _teacher_head: Head | None = None

    def _prepare_model(self, model: nn.Module) -> nn.Module:
        """Place the teacher; where processes hold it whole there are no gradients to average."""
        if self.accelerator.num_processes == 1 or self.is_fsdp_enabled:
            return super()._prepare_model(model)  # type: ignore[no-any-return]
        return self.accelerator.prepare_model(model, evaluation_mode=True)  # type: ignore[no-any-return]

    def _teacher_rows(self, tokens_BL: Tensor, mask_BL: Tensor) -> Callable[[slice], Tensor] | None:
        """Run the teacher's trunk once; its head follows piece by piece."""
        self._ensure_teacher_prepared()
        with self._teacher_liger_identity_lm_head(), self._precision():
            outputs = self._compute_teacher_outputs(packing.inputs(tokens_BL, self.end))
        hidden_TD = outputs.logits[:, :-1][mask_BL]
        if self._teacher_head is None:
            self._teacher_head = linear_head(self._get_unwrapped_teacher()).cast(self.head_dtype)
        head = self._teacher_head
        return lambda rows: head.logits(hidden_TD[rows])


class CachedTrainer(_ObjectiveTrainer, ModelOptHFTrainer):  # type: ignore[misc]
    """Trains on the objective with a teacher's rows from disk; no teacher is run."""

    cache: Cache

    def _teacher_rows(
        self, tokens_BL: Tensor, mask_BL: Tensor
    ) -> Callable[[slice], Tensor | TopK] | None:
        """Read the rows of the whole blocks of this micro-batch."""
        top = self.cache.rows(tokens_BL.cpu().numpy())[mask_BL.flatten().cpu()]
        return top.to(tokens_BL.device).__getitem__


class TaskTrainer(_ObjectiveTrainer, ModelOptHFTrainer):  # type: ignore[misc]
    """Trains on hard labels alone; there is no teacher and none is run."""


def linear_head(model: Any) -> Head:
    """The model's output head."""
    head = model.get_output_embeddings()
    return Head(head.weight, getattr(head, "bias", None))
