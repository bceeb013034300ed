"""A teacher with a tokenizer of its own, compared where both have read the same bytes.

Source: Boizard et al. 2024 (arXiv:2402.12030) for the loss; they pair tokens by their number, here
they are paired by the bytes before them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from trt_kd.checkpoints import load_tokenizer
from trt_kd.errors import ModelError
from trt_kd.teachers.base import Demand, Teacher
from trt_kd.teachers.online import OnlineTeacher
from trt_kd.teachers.spans import Translator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trt_kd.losses.base import KDLoss


@dataclass(frozen=True)
class Translated:
    """A frozen model and who gives it the student's text."""

    model: "PreTrainedModel"
    """With a linear head."""
    translator: Translator


class CrossTokenizerTeacher(Teacher):
    """Let the teacher read the student's text in its own tokens, in every step."""

    same_tokens: ClassVar[bool] = False

    kind: Literal["cross_tokenizer"] = "cross_tokenizer"
    """Name in the registry."""
    min_aligned_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the student's tokens, over all text of the run, that must end where one of the
    teacher's does; at the others there is nothing to compare."""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if "max_dropped_mass" in self.model_fields_set:
            raise ValueError("max_dropped_mass has no effect: no token is that of the student")
        return self

    def problem(self, loss: "KDLoss") -> str | None:
        """See the base class."""
        return None if loss.any_vocabulary else f"{loss.kind} needs one vocabulary"

    def targets(self, directory: Path, demand: Demand) -> Translated:
        """See the base class; also checks all blocks.

        Raises:
            ModelError: if too few boundaries are common, or a block is more than the teacher's
                context.
            ValueError: if the demand does not name the student's tokenizer.
        """
        if demand.tokenizer is None:
            raise ValueError("a teacher with another tokenizer needs the student's: give its path")
        translator = Translator(load_tokenizer(demand.tokenizer), load_tokenizer(directory))
        readings = [translator.read(block) for block in demand.blocks.tolist()]
        share = sum(len(one.pairs) for one in readings) / max(1, demand.blocks.size)
        if share < self.min_aligned_share:
            raise ModelError(
                f"{share:.0%} of the student's tokens end where one of the teacher's does, less "
                f"than teacher.min_aligned_share {self.min_aligned_share:.0%}",
                hint="take a teacher whose tokenizer cuts alike, or lower min_aligned_share",
            )
        model = OnlineTeacher().load(directory, precision=demand.precision)
        longest = max(len(one.ids) for one in readings)
        limit = getattr(model.config, "max_position_embeddings", None) or longest
        if longest > limit:
            raise ModelError(
                f"a block is {longest} tokens of the teacher's, more than its context of {limit}",
                hint="lower data.block_tokens",
            )
        return Translated(model, translator)
