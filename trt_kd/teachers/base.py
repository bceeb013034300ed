"""What a teacher is."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field
from typing_extensions import Self

from trt_kd.config import Plugin

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from trt_kd.losses.base import KDLoss
    from trt_kd.teachers.cache import Cache
    from trt_kd.teachers.cross_tokenizer import Translated
    from trt_kd.teachers.mixing import Mixture

    Targets: TypeAlias = PreTrainedModel | Mixture | Translated | Cache

Precision = Literal["bf16", "fp32"]
CHECKED_BLOCKS = 4
"""Blocks on which a teacher is looked at before it is used."""


@dataclass(frozen=True)
class Demand:
    """What training asks of a teacher."""

    blocks: "NDArray[np.int64]"
    """All token blocks that it reads, ``[count, L]``."""
    precision: Precision
    """That of its matrix products."""
    work: Path
    """Folder for what shall survive a kill."""
    vocabulary: int | None = None
    """Tokens of the student's output head; None if as many as the teacher's."""
    tokenizer: Path | None = None
    """Folder of the student's tokenizer."""


class Teacher(Plugin, ABC):
    """Turns a checkpoint into what the student imitates."""

    shows_layers: ClassVar[bool] = False
    """Whether the teacher runs beside the student, so that its layers can be read."""
    runs_beside: ClassVar[bool] = False
    """Whether it runs in every step on the student's own inputs; else its rows come from disk."""
    same_tokens: ClassVar[bool] = True
    """Whether it has the student's tokenizer; else losses compare without knowing tokens."""
    needs_checkpoint: ClassVar[bool] = True
    """Whether it reads a checkpoint of the teacher; else it is given the student's."""

    max_dropped_mass: Annotated[float, Field(ge=0, le=1)] = 1e-3
    """Mean probability per token, on the first blocks, that the teacher may give to padding tokens
    which the student's vocabulary lacks; the rest is scaled up to 1."""

    @abstractmethod
    def targets(self, directory: Path, demand: Demand) -> "Targets":
        """Make ready what training asks for.

        Args:
            directory: the teacher's checkpoint.
            demand: what training reads and wants.

        Returns:
            A frozen model whose ``logits`` ``[B, L, V]`` come from a linear head, several of them,
            or a cache of log-probabilities that holds every block.

        Raises:
            ModelError: if the checkpoint is damaged, or gives more than ``max_dropped_mass`` to
                tokens that the student lacks.
        """

    def problem(self, loss: "KDLoss") -> str | None:
        """Why ``loss`` cannot be had from this teacher; None where it can."""
        return None

    def further(self) -> list[Path]:
        """Checkpoints that it reads beside the stage's teacher."""
        return []

    def outside(self) -> dict[str, str]:
        """Fingerprints of ``further``, which identify a run together with its settings.

        Raises:
            ModelError: if one of them is missing or damaged.
        """
        from trt_kd.teachers.identity import digest_of_checkpoint

        paths = enumerate(self.further(), start=1)
        return {f"teacher_{number}": digest_of_checkpoint(path) for number, path in paths}

    def rehearsal(self) -> Self:
        """The same teacher for a rehearsal, which runs on a cut twin of the checkpoint."""
        return self
