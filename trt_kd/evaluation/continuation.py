"""Which of four continuations is the true one? Made from held-out text at run time."""

import random
from typing import Literal

from pydantic import PositiveInt

from trt_kd.data.base import DataConfig, documents
from trt_kd.errors import DataError
from trt_kd.evaluation.task import ChoiceItem, ChoiceTask

CHOICES = 4


class DocstringContinuation(ChoiceTask):
    """Choose the true continuation of a held-out text; the others come from other texts.

    Works for every data source; the name tells its default, the standard library's docstrings.
    """

    kind: Literal["docstring_continuation"] = "docstring_continuation"
    context_words: PositiveInt = 12
    """Words before the choice; short, because four passes per item are what the task costs."""
    continuation_words: PositiveInt = 6
    """Words of each choice, all cut from the same place of their text."""

    def items(self, data: DataConfig, *, limit: int, seed: int) -> list[ChoiceItem]:
        """See the base class."""
        length = self.context_words + self.continuation_words
        split = (text.split() for text in documents(data, "heldout"))
        texts = [words[:length] for words in split if len(words) >= length]
        starts = {" ".join(words[: self.context_words]): words for words in texts}
        endings = sorted({" ".join(words[self.context_words :]) for words in texts})
        if len(endings) < CHOICES:
            raise DataError(
                f"{self.kind} needs {CHOICES} held-out documents of {length} words with different "
                f"continuations, data source {data.source.kind} has {len(endings)}",
                hint="give longer documents, raise data.heldout_share or leave the task out",
            )
        rng = random.Random(seed)
        prompts = sorted(starts)
        rng.shuffle(prompts)
        made = []
        for number, prompt in enumerate(prompts[:limit]):
            truth = " ".join(starts[prompt][self.context_words :])
            others = [ending for ending in rng.sample(endings, CHOICES) if ending != truth]
            choices = others[: CHOICES - 1]
            choices.insert(number % CHOICES, truth)
            made.append(ChoiceItem(prompt, tuple(choices), number % CHOICES))
        return made
