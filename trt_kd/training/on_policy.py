"""How much of a run the student learns from text of its own, and how it writes that.

Source: Agarwal et al. 2024, generalised knowledge distillation (arXiv:2306.13649).
"""

import random
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt
from typing_extensions import Self

from trt_kd.config import StrictModel


class OnPolicy(StrictModel):
    """The student goes on from the first tokens of a block; the loss is taken on what it wrote."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Part of the steps that learn from the student's own text; which ones, the seed decides."""
    prompt_tokens: PositiveInt = 64
    """First tokens of each block, which the student continues."""
    new_tokens: PositiveInt = 64
    """Tokens that it may write; fewer where it ends the text. A step costs about so many forward
    passes over one token each beside its own."""
    temperature: PositiveFloat = 1.0
    """Of the sampling; 1 samples from the student as it is."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the likeliest tokens that hold so much probability."""

    def draws(self, step: int, seed: int) -> bool:
        """Whether the student writes what ``step``, counted from 0, learns from.

        A function of both numbers alone, so that a resumed run repeats it.
        """
        return random.Random(f"on policy {seed} {step}").random() < self.share

    def seed_of(self, step: int, seed: int, batch: int, process: int) -> int:
        """Seed of the sampling of one batch."""
        return random.Random(f"writing {seed} {step} {batch} {process}").getrandbits(32)

    def rehearsal(self) -> Self:
        """The same with a few tokens, at every step."""
        small = {"prompt_tokens": 1, "new_tokens": min(self.new_tokens, 4)}
        return self.model_copy(update={"share": 1.0, **small})
