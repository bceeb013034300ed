"""Texts that think before they answer: which are whole, short enough, and mean what they say.

Sources: DeepSeek-AI 2025 (arXiv:2501.12948) for long traces between delimiters; Wang et al. 2023,
SCOTT (arXiv:2305.01879), for answers that have to follow from what was said before.
"""

from typing import Literal, NamedTuple

from pydantic import FiniteFloat, PositiveInt, model_validator
from typing_extensions import Self

from trt_kd.config import StrictModel

Fault = Literal["unfinished", "undelimited", "too_long", "unsupported"]
"""Why a text is left out."""
FAULTS: tuple[Fault, ...] = ("unfinished", "undelimited", "too_long", "unsupported")


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


class Trace(NamedTuple):
    """One text's parts."""

    thought: str
    answer: str
    opened: bool
    """Whether the teacher wrote the opening itself."""
