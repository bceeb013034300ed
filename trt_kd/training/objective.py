"""What all trainers share: the objective of a step, taken on a student, and its line in the log.

Shape suffixes: B sequences, L positions, T valid tokens, D hidden size, V vocabulary.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from modelopt.torch.distill.plugins.huggingface import IGNORE_INDEX
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

from trt_kd.errors import TrtKdError
from trt_kd.losses.features.base import Reading
from trt_kd.training import packing
from trt_kd.training.balancing import Balancer, gradient_norms, shared_by
from trt_kd.training.exiting import exit_parts
from trt_kd.training.exits import Exits
from trt_kd.training.feature_terms import Both, FeatureTerms, Part
from trt_kd.training.head import Labels, Objective, TeacherRows, head_loss, linear_head
from trt_kd.training.history import MEASURED
from trt_kd.training.judging import Rows, judged, logits_of
from trt_kd.training.measured import Measured
from trt_kd.training.on_policy import PolicyGradient
from trt_kd.training.reading import Seen, reading
from trt_kd.training.rollout import Rollout
from trt_kd.training.sharding import PortableCheckpoints
from trt_kd.training.weights import weight_at

ObjectiveAt = Callable[[int], Objective]
"""The objective of a step, counted from 0."""


class ObjectiveTrainer(Measured, PortableCheckpoints):
    """Order of data, loss and log. Mixed in before a trainer of ModelOpt."""

    objective_at: ObjectiveAt
    head_dtype: torch.dtype
    features: FeatureTerms | None = None
    rollout: Rollout | None = None
    balancer: Balancer | None = None
    exits: Exits | None = None
    task_weights: Mapping[str, float] = {}
    """By name, of the tasks whose losses are logged apart."""
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
        labels = self._labels(inputs, mask_BK)
        student = trainer.accelerator.unwrap_model(trainer.model)
        with (
            self._reading(step) as both,
            self._sharing(step) as shared,
            reading(student, self._leaving(step)) as seen,
        ):
            hidden_BLD = self._hidden_states(model, tokens_BL)
            runs = objective.response_weight or both is not None
            teacher = self._teacher_rows(tokens_BL, mask_BK) if runs else None
        policy = self.rollout and self.rollout.policy(step)

        def head_of(objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
            head = linear_head(student)
            hidden_TD, beside = hidden_BLD[:, :-1][mask_BK], teacher
            if policy:
                own = logits_of(hidden_TD, head.cast(self.head_dtype))
                beside = self._judged(policy, own, teacher, labels.ids, mask_BK)
            return head_loss(
                objective,
                hidden_TD,
                head,
                labels,
                teacher=beside if objective.response_weight else None,
                dtype=self.head_dtype,
            )

        def summed(objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
            return trainer._sharded_liger_compute(lambda: head_of(objective))  # type: ignore[no-any-return]

        parts = self._parts(both, (seen, hidden_BLD), mask_BK)
        if self.balancer is not None:
            objective, parts = self._balanced(objective, parts, summed, (shared or [hidden_BLD])[0])
        total, task, response = summed(objective)
        count = mask_BK.sum() if num_items_in_batch is None else num_items_in_batch
        for name, value in self._token_sums.items():
            self._note(name, value / count)
        self._token_sums = {}
        if parts or self._alone():
            total = self._with_parts(total, parts, count)
        self._note("loss", total.detach() / count)
        if objective.task_weight:
            self._note_task(task, count)
        if objective.response_weight:
            self._note("response_nats_per_token", response / count)
        return total / count * trainer.accelerator.num_processes  # type: ignore[no-any-return]

    def _labels(self, inputs: dict[str, Tensor], mask_BK: Tensor) -> Labels:
        """Of the valid tokens, with what the text says of each."""
        ids_T = inputs["labels"][:, 1:][mask_BK]
        weights_T, tasks_T = (
            inputs[name][:, 1:][mask_BK] if name in inputs else None
            for name in ("weights", "tasks")
        )
        return Labels(ids_T, weights_T, tasks_T, len(self.task_weights) or 1)

    def _note_task(self, task: Tensor, count: Tensor | int) -> None:
        """Note the task term, and the mean over the tokens of every task that it is made of.

        The sum of a task holds its weight and, in place of its own count of tokens, ``count``.
        """
        self._note("task_nats_per_token", task.sum() / count)
        for number, (name, weight) in enumerate(self.task_weights.items()):
            self._note(f"{name}_nats_per_token", task[number] / (weight * count))

    def _judged(
        self, policy: PolicyGradient, student: Rows, teacher: Any, labels_T: Tensor, mask_BK: Tensor
    ) -> Callable[[slice], TeacherRows]:
        """The teacher's rows with what became of the text; what they note is noted once."""
        with self._unnoted():
            rows, weights_T = judged(policy, student, teacher, labels_T, mask_BK)
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

    def _leaving(self, step: int) -> list[tuple[int, Reading]]:
        """Layers whose states are read for the exits of ``step``."""
        if self.exits is None or self._alone() or not self._exit_weight(step):
            return []
        return [(layer, "states") for layer in self.exits.layers]

    def _exit_weight(self, step: int) -> float:
        trainer: Any = self
        return weight_at(trainer.exits.weight, step, trainer.state.max_steps)

    def _parts(
        self, both: Both | None, states: tuple[Seen, Tensor], mask_BK: Tensor
    ) -> dict[str, Part]:
        """Terms of this step beside task and response: features, then exits."""
        trainer: Any = self
        step, student = trainer.state.global_step, trainer.accelerator.unwrap_model(trainer.model)
        parts = self.features.parts(both, mask_BK, step) if self.features and both else {}
        if self._leaving(step):
            weight, dtype = self._exit_weight(step), self.head_dtype
            with self._precision():
                parts |= exit_parts(
                    trainer.exits, student, states, mask_BK, weight=weight, dtype=dtype
                )
        return parts

    def _with_parts(self, total: Tensor, parts: dict[str, Part], count: Tensor | int) -> Tensor:
        """Add features and exits to the sum over the tokens, or let features take its place."""
        for name, part in parts.items():
            self._note(name, part.value.detach() / count)
        weighted = sum(part.weight * part.value for part in parts.values())
        return total * (0.0 if self._alone() else 1.0) + weighted

    def _alone(self) -> bool:
        """Whether nothing but features is learnt at this step."""
        trainer: Any = self
        return self.features is not None and self.features.alone(trainer.state.global_step)

    def _sharing(self, step: int) -> AbstractContextManager[list[Tensor]]:
        """Keep what the terms of ``step`` share below the last hidden states."""
        trainer: Any = self
        student = trainer.accelerator.unwrap_model(trainer.model)
        if self.balancer is None:
            return shared_by(student, None)
        places = [layer + 1 for layer, _ in self._leaving(step)]
        lowest = self.features.lowest(step) if self.features is not None else None
        places += [] if lowest is None else [lowest]
        return shared_by(student, min(places, default=None))

    def _balanced(
        self,
        objective: Objective,
        parts: dict[str, Part],
        summed: Callable[[Objective], tuple[Tensor, Tensor, Tensor]],
        shared_BLD: Tensor,
    ) -> tuple[Objective, dict[str, Part]]:
        """The same terms with weights for which the norms are as the weights ask."""
        trainer, balancer = cast("Any", self), cast("Balancer", self.balancer)
        heads = {"response": objective.response_weight, "task": objective.task_weight}
        asked = {} if self._alone() else {name: w for name, w in heads.items() if w}
        asked |= {name: part.weight for name, part in parts.items() if part.weight}
        if balancer.due(trainer.state.global_step, asked, trainer.state.log_history):
            bare = {
                "response": objective.weighed(task=0.0, response=1.0),
                "task": objective.weighed(task=1.0, response=0.0),
            }
            with self._unnoted():
                values = {name: summed(one)[0] for name, one in bare.items() if name in asked}
            values |= {name: part.value for name, part in parts.items() if name in asked}
            balancer.take(gradient_norms(values, shared_BLD))
        found = heads | balancer.weights(asked)
        parts = {name: part._replace(weight=found.get(name, 0.0)) for name, part in parts.items()}
        return objective.weighed(task=found["task"], response=found["response"]), parts

    @contextmanager
    def _unnoted(self) -> Iterator[None]:
        """Leave the sums over tokens as they are: a pass before the one that is noted."""
        noted = dict(self._token_sums)
        yield
        self._token_sums = noted

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
            logs |= self.balancer.logged() if self.balancer else {}
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
