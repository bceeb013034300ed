"""The student continues prompts, and what it wrote becomes the batch that a step learns from.

Shape suffixes: B sequences, P tokens of a prompt, N new tokens, L = P + N.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from modelopt.torch.distill.plugins.huggingface import IGNORE_INDEX
from torch import Tensor
from transformers import PreTrainedModel

from trt_kd.teachers.base import Precision
from trt_kd.teachers.writer import Choice, settings_of
from trt_kd.training.on_policy import OnPolicy


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
    process: int = 0
    """Number of this process: each writes its own."""

    def draws(self, step: int) -> bool:
        """Whether the student writes what ``step``, counted from 0, learns from."""
        return self.config.draws(step, self.seed)

    def batch(
        self, student: PreTrainedModel, batch: dict[str, Tensor], step: int, number: int
    ) -> dict[str, Tensor]:
        """What the student makes of the beginnings of ``batch``.

        Args:
            student: whose weights are those of the step; left as it was, and so are generators.
            batch: ``input_ids`` ``[B, ...]`` of at least ``prompt_tokens`` tokens.
            step: counted from 0.
            number: of the batch in the step.

        Returns:
            ``input_ids`` ``[B, L]`` and ``labels``, which are the new tokens up to the one that
            ends the text, and nothing to predict elsewhere.
        """
        config = self.config
        prompts_BP = batch["input_ids"][:, : config.prompt_tokens]
        choice = Choice(config.new_tokens, config.temperature, config.top_p, self.precision)
        seed = config.seed_of(step, self.seed, number, self.process)
        with _writing(student, choice, self.ends, seed):
            runner: Any = student
            tokens_BL = runner.generate(
                input_ids=prompts_BP, attention_mask=torch.ones_like(prompts_BP)
            )
        return {
            "input_ids": tokens_BL,
            "labels": written(tokens_BL, prompts_BP.shape[1], self.ends),
        }


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
def _writing(
    student: PreTrainedModel, choice: Choice, ends: list[int], seed: int
) -> Iterator[None]:
    """Let ``student`` write with generators of its own; afterwards all is as it was."""
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
            yield
    finally:
        runner.generation_config = settings
        student.train(training)
