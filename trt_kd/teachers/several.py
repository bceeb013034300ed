"""Several teachers beside the student, mixed into one.

Sources: the mean of an ensemble's probabilities, Hinton et al. 2015 (arXiv:1503.02531), and of its
logits; the choice per sample of the teacher that knows the text best, Yuan et al. 2021
(arXiv:2012.06048), here by perplexity alone.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, model_validator
from typing_extensions import Self

from trt_kd.teachers.base import Demand, Teacher
from trt_kd.teachers.online import OnlineTeacher

if TYPE_CHECKING:
    from trt_kd.teachers.mixing import Mixture

Combine = Literal["probabilities", "logits", "best"]


class SeveralTeachers(Teacher):
    """Run several teachers of one tokenizer in every step and mix what they say."""

    runs_beside: ClassVar[bool] = True

    kind: Literal["several"] = "several"
    """Name in the registry."""
    others: Annotated[list[str], Field(min_length=1)]
    """Folders of checkpoints beside the stage's own teacher, relative to the folder that the
    command runs in; digests of what is in them are part of a run's identity."""
    combine: Combine = "probabilities"
    """Weighted mean of probabilities or of logits, or for each block the teacher with the lowest
    cross-entropy on it."""
    weights: list[PositiveFloat] | None = None
    """Share of each teacher, the stage's own first, scaled to sum to 1; equal where left out."""

    @model_validator(mode="after")
    def _weights_have_effect(self) -> Self:
        if self.weights is not None and self.combine == "best":
            raise ValueError("weights have no effect where combine is best: leave them out")
        if self.weights is not None and len(self.weights) != 1 + len(self.others):
            raise ValueError(
                f"{len(self.weights)} weights for {1 + len(self.others)} teachers: "
                f"give one for the stage's own teacher and one for each of others"
            )
        return self

    @property
    def shares(self) -> tuple[float, ...]:
        """Weights that sum to 1, the stage's own teacher first."""
        weights = self.weights or [1.0] * (1 + len(self.others))
        return tuple(weight / sum(weights) for weight in weights)

    def further(self) -> list[Path]:
        """See the base class."""
        return [Path(other) for other in self.others]

    def targets(self, directory: Path, demand: Demand) -> "Mixture":
        """See the base class; every teacher is held in memory."""
        from trt_kd.teachers.mixing import Mixture

        online = OnlineTeacher(max_dropped_mass=self.max_dropped_mass)
        models = [online.targets(place, demand) for place in (directory, *self.further())]
        return Mixture(models, self.shares, self.combine)

    def rehearsal(self) -> Self:
        """See the base class; the stage's own teacher alone, whose twin is cut to two layers."""
        return self.model_copy(update={"others": [], "weights": None})
