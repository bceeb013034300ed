"""The student continues prompts, and what it wrote becomes the batch that a step learns from.

Shape suffixes: B sequences, P tokens of a prompt, N new tokens, L = P + N, S tokens so far, V
vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import log
from typing import Any

import torch
from modelopt.torch.distill.plugins.huggingface import IGNORE_INDEX
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from trt_kd.teachers.base import Precision
from trt_kd.teachers.writer import Choice, settings_of
from trt_kd.training.distributed import Processes
from trt_kd.training.on_policy import OnPolicy, PolicyGradient


@dataclass(frozen=True)
class Rollout:
    """Writes the batches of the steps that are drawn; a function of step and weights alone."""

    config: OnPolicy
    seed: int
    """That of the run."""
    ends: list[int]
    """Tokens that end a text; without one every continuation is of full length."""
    precision: Precision
    """Of the matrix products."""
    processes: Processes = Processes()  # noqa: RUF009 - frozen
    """Who writes the step's batches, in turn; the text is the same for any number of them."""
    known: int | None = None
    """Tokens that every reader has, from 0 on; those after are padding and never written."""

    def draws(self, step: int) -> bool:
        """Whether the student writes what ``step``, counted from 0, learns from."""
        return self.config.draws(step, self.seed)

    def policy(self, step: int) -> PolicyGradient | None:
        """The policy gradient that ``step`` takes, or None."""
        return self.config.policy_gradient if self.draws(step) else None

    @property
    def teacher_mix(self) -> float:
        """Share of the teacher in what is sampled from."""
        policy = self.config.policy_gradient
        return policy.teacher_mix if policy else 0.0

    def batch(
        self,
        student: PreTrainedModel,
        batch: dict[str, Tensor],
        step: int,
        number: int,
        teacher: PreTrainedModel | None = None,
    ) -> dict[str, Tensor]:
        """What the student makes of the beginnings of ``batch``.

        Args:
            student: whose weights are those of the step; left as it was, and so are generators.
            batch: ``input_ids`` ``[B, ...]`` of at least ``prompt_tokens`` tokens.
            step: counted from 0.
            number: of the batch among those that this process has in the step.
            teacher: where ``teacher_mix`` is not 0, the one that is mixed in.

        Returns:
            ``input_ids`` ``[B, L]`` and ``labels``, which are the new tokens up to the one that
            ends the text, and nothing to predict elsewhere.
        """
        config = self.config
        prompts_BP = batch["input_ids"][:, : config.prompt_tokens]
        choice = Choice(config.new_tokens, config.temperature, config.top_p, self.precision)
        part = self.processes
        seed = config.seed_of(step, self.seed, number * part.count + part.rank)
        mixed = [] if teacher is None else [TeacherMix(teacher, self.teacher_mix)]
        with _writing(student, choice, self.ends, seed) as settings:
            if self.known is not None and self.known < student.config.vocab_size:
                settings.suppress_tokens = [*range(self.known, student.config.vocab_size)]
            runner: Any = student
            tokens_BL = runner.generate(
                input_ids=prompts_BP,
                attention_mask=torch.ones_like(prompts_BP),
                logits_processor=mixed,
            )
        return {
            "input_ids": tokens_BL,
            "labels": written(tokens_BL, prompts_BP.shape[1], self.ends),
        }


class TeacherMix(LogitsProcessor):
    """Turns the student's scores into those of its mixture with a teacher that reads along."""

    def __init__(self, teacher: PreTrainedModel, share: float) -> None:
        self.teacher = teacher
        self.share = share
        self._cache: Any = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Log-probabilities ``[B, V]`` of the mixture.

        Args:
            input_ids: tokens so far ``[B, S]``, one more than at the call before.
            scores: the student's logits ``[B, V]`` of the next one.
        """
        unread_BS = input_ids if self._cache is None else input_ids[:, -1:]
        read = self.teacher(input_ids=unread_BS, past_key_values=self._cache, use_cache=True)
        self._cache = read.past_key_values
        columns = scores.shape[1]
        log_p = read.logits[:, -1, :columns].to(scores.dtype).log_softmax(-1)
        never = scores.new_full((len(scores), columns - log_p.shape[1]), -torch.inf)
        log_p = torch.cat((log_p, never), -1)
        log_q = scores.log_softmax(-1)
        return torch.logaddexp(log_p + log(self.share), log_q + log(1 - self.share))


def written(tokens_BL: Tensor, prompt: int, ends: list[int]) -> Tensor:
    """Labels ``[B, L]``: all tokens after a prompt of ``prompt`` up to the first end, with it."""
    labels_BL = tokens_BL.clone()
    labels_BL[:, :prompt] = IGNORE_INDEX
    if ends:
        end_BN = torch.isin(tokens_BL[:, prompt:], torch.tensor(ends, device=tokens_BL.device))
        after_BN = end_BN.long().cumsum(1) > end_BN.long()
        labels_BL[:, prompt:][after_BN] = IGNORE_INDEX
    return labels_BL


@contextmanager
def _writing(student: PreTrainedModel, choice: Choice, ends: list[int], seed: int) -> Iterator[Any]:
    """Let ``student`` write with generators and settings of its own; then all is as it was."""
    runner: Any = student
    device = student.device
    settings, training = runner.generation_config, student.training
    cuda = [device] if device.type == "cuda" else []
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=choice.precision == "bf16")
    student.train(False)
    runner.generation_config = settings_of(choice, ends)
    try:
        with torch.random.fork_rng(devices=cuda), torch.no_grad(), bf16:
            torch.manual_seed(seed)
            yield runner.generation_config
    finally:
        runner.generation_config = settings
        student.train(training)
