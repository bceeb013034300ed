"""Texts that think before they answer: which are whole, short enough, and mean what they say.

Sources: DeepSeek-AI 2025 (arXiv:2501.12948) for long traces between delimiters; Wang et al. 2023,
SCOTT (arXiv:2305.01879), for answers that have to follow from what was said before; Zelikman et al.
2022, STaR (arXiv:2203.14465), for traces that have to end at the known answer.
"""

import re
from typing import Literal, NamedTuple

from pydantic import FiniteFloat, PositiveInt, model_validator
from typing_extensions import Self

from trt_kd.config import StrictModel

Fault = Literal["unfinished", "undelimited", "too_long", "wrong", "unsupported"]
"""Why a text is left out."""
FAULTS: tuple[Fault, ...] = ("unfinished", "undelimited", "too_long", "wrong", "unsupported")


class Traces(StrictModel):
    """What a text must be to be kept: a delimited trace, then an answer, both whole."""

    open: str = "<think>"
    """Begins the trace; where the chat template writes it, the teacher does not."""
    close: str = "</think>"
    """Ends the trace; the answer follows."""
    most_tokens: PositiveInt = 2048
    """Tokens of the longest trace that is kept."""
    least_gain_nats: FiniteFloat | None = None
    """Keep a trace only if the teacher finds its answer by so many nats per token likelier behind
    it than behind an empty one; not asked if left out."""

    answer_field: str | None = None
    """Field of the data that holds the known answer: a trace that ends at another one is left out.
    Where a document has none, its trace is not compared."""
    answer_pattern: str | None = None
    """Regular expression whose first group is what is compared, the last find in the answer; by
    default the whole answer. White space at the ends, and how much of it there is, never counts."""

    @model_validator(mode="after")
    def _compares(self) -> Self:
        if self.answer_pattern is None:
            return self
        if self.answer_field is None:
            raise ValueError("answer_pattern has no effect: there is no answer_field")
        try:
            groups = re.compile(self.answer_pattern).groups
        except re.error as error:
            raise ValueError(f"answer_pattern is no regular expression: {error}") from error
        if not groups:
            raise ValueError(f"answer_pattern {self.answer_pattern!r} has no group in parentheses")
        return self

    @model_validator(mode="after")
    def _delimits(self) -> Self:
        if not self.open.strip() or not self.close.strip() or self.open == self.close:
            raise ValueError("open and close must be two different texts that are not blank")
        return self

    def split(self, written: str) -> "Trace | None":
        """The trace and the answer in what the teacher wrote; None where it is not so divided."""
        opened = written.lstrip().startswith(self.open)
        body = written.lstrip().removeprefix(self.open) if opened else written
        thought, closed, answer = body.partition(self.close)
        again = any(mark in part for mark in (self.open, self.close) for part in (thought, answer))
        if not closed or again or not thought.strip() or not answer.strip():
            return None
        return Trace(thought, answer, opened)

    def agrees(self, answer: str, known: str) -> bool:
        """Whether what the teacher says in the end is the known answer."""
        said: str | None = answer
        if self.answer_pattern is not None:
            found = list(re.finditer(self.answer_pattern, answer))
            said = found[-1][1] if found else None
        return said is not None and said.split() == known.split()


class Trace(NamedTuple):
    """One text's parts."""

    thought: str
    answer: str
    opened: bool
    """Whether the teacher wrote the opening itself."""
