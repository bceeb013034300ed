"""What every task of our own is: multiple-choice items made without a network."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from trt_kd.config import Plugin
from trt_kd.data.base import DataConfig


@dataclass(frozen=True)
class ChoiceItem:
    """One question: the model is right if it finds ``choices[answer]`` the likeliest."""

    prompt: str
    """Text before the choice, without white space at its end."""
    choices: tuple[str, ...]
    """What may follow after one space."""
    answer: int
    """Index of the true choice."""


class ChoiceTask(Plugin, ABC):
    """A source of multiple-choice items; lm-evaluation-harness asks and scores them."""

    @abstractmethod
    def items(self, data: DataConfig, *, limit: int, seed: int) -> list[ChoiceItem]:
        """At most ``limit`` items; the true choice stands equally often in every place.

        The same arguments give the same items on every machine.

        Raises:
            DataError: if there is too little text to make items from.
        """
