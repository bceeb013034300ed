"""How much of a run the student learns from text of its own, and how it writes that.

Sources: Agarwal et al. 2024, generalised knowledge distillation (arXiv:2306.13649); Gu et al. 2024,
MiniLLM (arXiv:2306.08543), for the policy gradient.
"""

import random
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from typing_extensions import Self

from trt_kd.config import StrictModel


class PolicyGradient(StrictModel):
    """MiniLLM: descend on the reverse KL between whole texts, with its three stabilisers."""

    single_step: bool = True
    """Take a token's own KL exactly, over the vocabulary, and only what follows from the sample."""
    teacher_mix: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the teacher in what is sampled from, against texts that exploit its blind spots;
    a token then counts by how likely the student alone finds it."""
    length_normalised: bool = True
    """Divide what follows a token by the number of tokens that follow, against short texts."""


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
    policy_gradient: PolicyGradient | None = None
    """Count what a token leads to as well, in the place of the loss (MiniLLM); by default each
    token is judged for itself, by the loss (GKD)."""

    @model_validator(mode="after")
    def _samples_what_is_judged(self) -> Self:
        if self.policy_gradient is None:
            return self
        if self.temperature != 1 or self.top_p != 1:
            raise ValueError(
                f"policy_gradient holds for text of the student as it is: temperature "
                f"{self.temperature:g} and top_p {self.top_p:g} must both be 1"
            )
        if self.new_tokens == 1:
            raise ValueError(
                "policy_gradient has no effect where new_tokens is 1: nothing follows a token"
            )
        return self

    def draws(self, step: int, seed: int) -> bool:
        """Whether the student writes what ``step``, counted from 0, learns from.

        A function of both numbers alone, so that a resumed run repeats it.
        """
        return random.Random(f"on policy {seed} {step}").random() < self.share

    def seed_of(self, step: int, seed: int, batch: int) -> int:
        """Seed of the sampling of one batch of the step, whichever process writes it."""
        return random.Random(f"writing {seed} {step} {batch}").getrandbits(32)

    def rehearsal(self) -> Self:
        """The same with a few tokens, at every step."""
        small = {"prompt_tokens": 1, "new_tokens": min(self.new_tokens, 4)}
        return self.model_copy(update={"share": 1.0, **small})
