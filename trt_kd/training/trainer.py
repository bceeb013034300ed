"""The objective on ModelOpt's Hugging Face trainers.

Shape suffixes: B sequences, L positions, T valid tokens, D hidden size, V vocabulary.
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast
from modelopt.torch.distill.plugins.huggingface import IGNORE_INDEX, KDTrainer
from modelopt.torch.opt.plugins import ModelOptHFTrainer
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler

from trt_kd.errors import TrtKdError
from trt_kd.teachers.cache import Cache
from trt_kd.training import packing
from trt_kd.training.alignment import AlignedHead, aligned
from trt_kd.training.feature_terms import Both, FeatureTerms
from trt_kd.training.head import Head, Objective, TeacherRows, head_loss
from trt_kd.training.heldout import heldout_sums
from trt_kd.training.history import MEASURED
from trt_kd.training.judging import Rows, judged, logits_of
from trt_kd.training.on_policy import PolicyGradient
from trt_kd.training.rollout import Rollout
from trt_kd.training.sharding import PortableCheckpoints, gathered

ObjectiveAt = Callable[[int], Objective]
"""The objective of a step, counted from 0."""


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
            labels_L[1:][~packing.goes_on(tokens_L, self.end)] = IGNORE_INDEX
        return {"input_ids": tokens_L, "labels": labels_L}


class _ObjectiveTrainer(PortableCheckpoints):
    """What both trainers share: order of data, loss, log. Mixed in before a trainer of ModelOpt."""

    objective_at: ObjectiveAt
    head_dtype: torch.dtype
    features: FeatureTerms | None = None
    rollout: Rollout | None = None
    one_vocabulary: bool = True  # else there is no divergence to measure token by token
    end: int | None

    def start(
        self, objective_at: ObjectiveAt, head_dtype: torch.dtype, end: int | None = None
    ) -> None:
        """Set what to minimize, the dtype of the head's products and what ends a document."""
        self.end = end
        self.objective_at = objective_at
        self.head_dtype = head_dtype
        self.model_accepts_loss_kwargs = True  # the token count comes as num_items_in_batch
        self._sums: dict[str, Tensor] = {}
        self._token_sums: dict[str, Tensor] = {}
        self._heldout_rows: list[Callable[[slice], TeacherRows] | None] = []
        self._mark = time.monotonic()

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        """Read in order: every variant sees the same tokens at the same step."""
        return SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]

    def get_batch_samples(self, *arguments: Any) -> tuple[list[dict[str, Tensor]], Any]:
        """The passes of a step and their count of tokens, written by the student where it is."""
        batches, count = super().get_batch_samples(*arguments)  # type: ignore[misc]
        trainer: Any = self
        step = trainer.state.global_step
        if self.rollout is None or not self.rollout.draws(step):
            return batches, count
        student = trainer.accelerator.unwrap_model(trainer.model)
        write = partial(self.rollout.batch, student, teacher=self._mixed_in())
        made = [write(batch, step, number) for number, batch in enumerate(batches)]
        tokens = torch.stack([(batch["labels"] != IGNORE_INDEX).sum() for batch in made]).sum()
        rows = sum(len(batch["labels"]) for batch in made) * trainer.accelerator.num_processes
        self._note("generated_tokens", tokens / rows)
        return made, trainer._get_num_items_in_batch(made, trainer.args.device)

    def _mixed_in(self) -> Any:
        """The teacher that the student's text is sampled with, or None."""
        return None

    def _get_lm_head(self, model: Any) -> nn.Module:
        return model.get_output_embeddings()  # type: ignore[no-any-return]

    def _teacher_rows(
        self, tokens_BL: Tensor, mask_BL: Tensor
    ) -> Callable[[slice], TeacherRows] | None:
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
        step = trainer.state.global_step
        objective = self.objective_at(step)
        tokens_BL, labels_BK = inputs["input_ids"], inputs["labels"][:, 1:]
        mask_BK = labels_BK != IGNORE_INDEX
        with self._reading(step) as both:
            hidden_BLD = self._hidden_states(model, tokens_BL)
            runs = objective.response_weight or both is not None
            teacher = self._teacher_rows(tokens_BL, mask_BK) if runs else None
        student = trainer.accelerator.unwrap_model(trainer.model)

        policy = self.rollout and self.rollout.policy(step)

        def summed() -> tuple[Tensor, Tensor, Tensor]:
            head, labels_T = linear_head(student), labels_BK[mask_BK]
            hidden_TD, beside = hidden_BLD[:, :-1][mask_BK], teacher
            if policy:
                own = logits_of(hidden_TD, head.cast(self.head_dtype))
                beside = self._judged(policy, own, teacher, labels_T, mask_BK)
            return head_loss(
                objective,
                hidden_TD,
                head,
                labels_T,
                teacher=beside if objective.response_weight else None,
                dtype=self.head_dtype,
            )

        total, task, response = trainer._sharded_liger_compute(summed)
        count = mask_BK.sum() if num_items_in_batch is None else num_items_in_batch
        for name, value in self._token_sums.items():
            self._note(name, value / count)
        self._token_sums = {}
        if both is not None:
            total = self._with_features(total, both, mask_BK, count)
        self._note("loss", total.detach() / count)
        if objective.task_weight:
            self._note("task_nats_per_token", task / count)
        if objective.response_weight:
            self._note("response_nats_per_token", response / count)
        return total / count * trainer.accelerator.num_processes  # type: ignore[no-any-return]

    def _judged(
        self, policy: PolicyGradient, student: Rows, teacher: Any, labels_T: Tensor, mask_BK: Tensor
    ) -> Callable[[slice], TeacherRows]:
        """The teacher's rows with what became of the text; what they note is noted once."""
        noted = dict(self._token_sums)
        rows, weights_T = judged(policy, student, teacher, labels_T, mask_BK)
        self._token_sums = noted
        if policy.teacher_mix:
            self._add("importance_weight", weights_T.sum())
        return rows

    def _hidden_states(self, model: nn.Module, tokens_BL: Tensor) -> Tensor:
        """The student's last hidden states ``[B, L, D]``."""
        trainer: Any = self
        with trainer._liger_identity_lm_head(), self._precision():
            return model(**packing.inputs(tokens_BL, self.end)).logits  # type: ignore[no-any-return]

    def _precision(self) -> AbstractContextManager[Any]:
        """Autocast, with which accelerate wraps every model but a sharded one."""
        trainer: Any = self
        if trainer.is_fsdp_enabled and self.head_dtype == torch.bfloat16:
            return torch.autocast(trainer.args.device.type, torch.bfloat16)
        return nullcontext()

    def _reading(self, step: int) -> AbstractContextManager[Both | None]:
        """Read what the features of ``step`` need of both models' next forward passes."""
        if self.features is None or not self.features.at(step):
            return nullcontext()
        trainer: Any = self
        student = trainer.accelerator.unwrap_model(trainer.model)
        return self.features.reading(student, trainer._get_unwrapped_teacher(), step)

    def _with_features(
        self, total: Tensor, both: Both, mask_BK: Tensor, count: Tensor | int
    ) -> Tensor:
        """Add the features to the sum over the tokens, or let them take its place."""
        trainer: Any = self
        features: Any = self.features
        step = trainer.state.global_step
        weighted, sums = features.sums(both, mask_BK, step)
        for name, value in sums.items():
            self._note(name, value / count)
        return total * (0.0 if features.alone(step) else 1.0) + weighted  # type: ignore[no-any-return]

    def create_optimizer(self) -> torch.optim.Optimizer:
        """The student's optimizer, with the projectors in a group without weight decay."""
        optimizer: torch.optim.Optimizer = super().create_optimizer()  # type: ignore[misc]
        extra = [] if self.features is None else list(self.features.parameters())
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if extra and id(extra[0]) not in known:
            optimizer.add_param_group({"params": extra, "weight_decay": 0.0})
        return optimizer

    def _add(self, name: str, value: Tensor) -> None:
        """Add to a sum over the tokens of this micro-batch."""
        total = self._token_sums.get(name)
        self._token_sums[name] = value if total is None else total + value

    def _note(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    @torch.no_grad()
    def measure(self, blocks: NDArray[np.int64], batch_size: int) -> dict[str, float]:
        """Task loss and entropy of the student on ``blocks`` ``[N, L]``, in nats per token.

        With a teacher also the divergence from it and the share of tokens at which both find the
        same token likeliest. The teacher runs once: give the same blocks every time. Of several
        processes each makes the same call.
        """
        trainer: Any = self
        model = trainer.model_wrapped
        sums, count, training = torch.zeros(4, dtype=torch.float64), 0, model.training
        model.eval()
        for number, start in enumerate(range(0, len(blocks), batch_size)):
            tokens_BL = torch.from_numpy(blocks[start : start + batch_size]).to(trainer.args.device)
            mask_BK = packing.goes_on(tokens_BL, self.end)
            hidden_TD = self._hidden_states(model, tokens_BL)[:, :-1][mask_BK]
            if number == len(self._heldout_rows):
                beside = self._teacher_rows(tokens_BL, mask_BK) if self.one_vocabulary else None
                self._heldout_rows.append(beside)
            labels_T = tokens_BL[:, 1:][mask_BK]
            sums += self._heldout_sums(hidden_TD, labels_T, self._heldout_rows[number]).cpu()
            count += len(labels_T)
        self._token_sums = {}  # training logs its own
        model.train(training)
        task, entropy, divergence, agreement = (sums / count).tolist()
        found = {
            "heldout_task_nats_per_token": task,
            "heldout_entropy_nats_per_token": entropy,
        }
        if self._heldout_rows[0] is not None:
            found["heldout_kl_nats_per_token"] = divergence
            found["heldout_top1_agreement"] = agreement
        return found

    def _heldout_sums(
        self,
        hidden_TD: Tensor,
        labels_T: Tensor,
        teacher: Callable[[slice], TeacherRows] | None,
    ) -> Tensor:
        trainer: Any = self
        student = trainer.accelerator.unwrap_model(trainer.model)

        def summed() -> Tensor:
            head = linear_head(student).cast(self.head_dtype)
            return heldout_sums(hidden_TD, head, labels_T, teacher)

        return trainer._sharded_liger_compute(summed)  # type: ignore[no-any-return]

    def agreed(self, values: dict[str, float]) -> dict[str, float]:
        """The values of process 0, so that what follows from them is the same everywhere."""
        told = torch.tensor(list(values.values()), dtype=torch.float64)
        return dict(zip(values, broadcast(told).tolist(), strict=True))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the step's terms, unrounded, its weights and its duration.

        Raises:
            TrtKdError: if a value is not finite.
        """
        trainer: Any = self
        if "loss" in logs:
            for name, value in self._sums.items():
                logs[name] = float(trainer.accelerator.reduce(value, reduction="sum"))
            self._sums = {}
            objective = self.objective_at(trainer.state.global_step - 1)
            for term in ("task", "response"):
                if f"{term}_nats_per_token" in logs:
                    logs[f"{term}_weight"] = getattr(objective, f"{term}_weight")
            now = time.monotonic()
            logs["seconds"], self._mark = now - self._mark, now
        self._check(logs, trainer.state.global_step)
        super().log(logs, start_time)  # type: ignore[misc]
        if MEASURED in logs:
            self._mark = time.monotonic()  # a step's duration is that of training alone

    @staticmethod
    def _check(logs: dict[str, float], step: int) -> None:
        for name, value in logs.items():
            if not math.isfinite(value):
                if step == 0:
                    raise TrtKdError(
                        f"before any training {name} is {value}",
                        hint="student or teacher is damaged, NaN in its weights: make it again",
                    )
                raise TrtKdError(
                    f"training diverged at step {step}: {name} is {value}",
                    hint="set a smaller learning_rate, more warmup_steps or precision: fp32",
                )


class DistillTrainer(_ObjectiveTrainer, KDTrainer):  # type: ignore[misc]
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


class CachedTrainer(_ObjectiveTrainer, ModelOptHFTrainer):  # type: ignore[misc]
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


class TaskTrainer(_ObjectiveTrainer, ModelOptHFTrainer):  # type: ignore[misc]
    """Trains on hard labels alone; there is no teacher and none is run."""


def linear_head(model: Any) -> Head:
    """The model's output head."""
    head = model.get_output_embeddings()
    return Head(head.weight, getattr(head, "bias", None))
