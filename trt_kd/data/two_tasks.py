"""Traces as examples of two tasks, a block for each: the answer, and the rationale behind it.

Source: Hsieh et al. 2023, Distilling step-by-step (arXiv:2305.02301).

Shape suffixes: N blocks, L positions.
"""

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from trt_kd.data.base import DataConfig, Split, documents, shuffled
from trt_kd.data.source import Traced
from trt_kd.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

LABEL, RATIONALE = 1, 2
"""What a token is learnt for; 0 where it is not: in prompts and padding."""


class TaskBlocks(NamedTuple):
    """Blocks and what they are learnt for."""

    tokens: "NDArray[np.int64]"
    """``[N, L]``."""
    task: "NDArray[np.int8]"
    """``[N, L]``: ``LABEL``, ``RATIONALE`` or 0."""


@dataclass(frozen=True)
class TwoTaskText:
    """Text whose traces become two examples each: first that of the answer, then the rationale."""

    config: DataConfig
    tokenizer: "PreTrainedTokenizerBase"
    prefixes: tuple[str, str]
    """What stands before the prompt where the answer is asked, and where the rationale is."""
    seed: int = 0
    """Of the order, which is that of ``token_blocks``."""

    def blocks(self, split: Split, count: int, offset: int = 0) -> TaskBlocks:
        """``count`` blocks after the first ``offset``: prompt, what is learnt, end, and padding.

        The token that ends a text is learnt too; padding is made of it.

        Raises:
            DataError: if there are not so many traces, or one is longer than a block.
        """
        traces, size = self._traces(split), self.config.block_tokens
        first, last = offset // 2, -(-(offset + count) // 2)
        if last > len(traces):
            raise DataError(
                f"the {split} split holds {len(traces)} traces, two blocks each, not {last}",
                hint="let the teacher write more, ask for fewer blocks, or change "
                "data.heldout_share",
            )
        examples = list(chain.from_iterable(map(self._examples, traces[first:last])))
        longest = max((len(prompt) + len(learnt) for prompt, learnt, _ in examples), default=0)
        if longest > size:
            raise DataError(
                f"an example has {longest} tokens, more than data.block_tokens {size}",
                hint=f"set data.block_tokens to {longest}, or generate with a smaller "
                "traces.most_tokens",
            )
        tokens_NL = np.full((len(examples), size), self._end(), dtype=np.int64)
        task_NL = np.zeros((len(examples), size), dtype=np.int8)
        for row, (prompt, learnt, task) in enumerate(examples):
            end = len(prompt) + len(learnt)
            tokens_NL[row, :end] = prompt + learnt
            task_NL[row, len(prompt) : end] = task
        wanted = slice(offset - 2 * first, offset - 2 * first + count)
        return TaskBlocks(tokens_NL[wanted], task_NL[wanted])

    def _traces(self, split: Split) -> list[Traced]:
        known = self.config.source.traced()
        texts = shuffled(documents(self.config, split), self.seed)
        return [known[text] for text in texts if text in known]

    def _examples(self, trace: Traced) -> "Iterator[tuple[list[int], list[int], int]]":
        learnt = ((LABEL, trace.answer), (RATIONALE, trace.thought))
        for prefix, (task, text) in zip(self.prefixes, learnt, strict=True):
            yield self._ids(prefix + trace.prompt), [*self._ids(text), self._end()], task

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[no-any-return]

    def _end(self) -> int:
        end = self.tokenizer.eos_token_id
        if not isinstance(end, int):
            raise DataError(
                "the tokenizer has no end-of-text token to end an example with",
                hint="set eos_token in its tokenizer_config.json",
            )
        return end


def weights(
    task_NL: "NDArray[np.int8]", step_blocks: int, rationale_weight: float
) -> "NDArray[np.float32]":
    """Weights ``[N, L]`` by which the mean over a step's learnt tokens becomes that of the tasks.

    Sum over the tokens of weight times loss, divided by the count of tokens with a weight above 0,
    is mean over the answers' tokens + ``rationale_weight`` times mean over the rationales' tokens.

    Args:
        task_NL: what every token is learnt for; nothing predicts the first one of a block.
        step_blocks: blocks of a step, whoever reads them.
        rationale_weight: lambda of the paper; rationales are left out where it is 0.
    """
    asked = {LABEL: 1.0, RATIONALE: rationale_weight}
    found_NL = np.zeros(task_NL.shape)
    for start in range(0, len(task_NL), step_blocks):
        rows = slice(start, start + step_blocks)
        counts = {task: int((task_NL[rows, 1:] == task).sum()) for task, w in asked.items() if w}
        for task, count in counts.items():
            share = asked[task] * sum(counts.values()) / max(1, count)
            found_NL[rows][task_NL[rows] == task] = share
    found_NL[:, :1] = 0.0
    return found_NL.astype(np.float32)
