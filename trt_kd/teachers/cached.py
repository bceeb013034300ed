"""The teacher runs once over the training text; its likeliest tokens are kept on disk."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from typing_extensions import Self

from trt_kd.teachers.base import Demand, Teacher
from trt_kd.teachers.online import OnlineTeacher

if TYPE_CHECKING:
    from trt_kd.losses.base import KDLoss
    from trt_kd.teachers.cache import Cache
    from trt_kd.teachers.identity import Identity
    from trt_kd.teachers.shards import Contents


class CachedTeacher(Teacher):
    """Write some of the teacher's log-probabilities once, then train without it.

    Of every position the likeliest tokens, the mass of all others, and tokens drawn from those.
    """

    kind: Literal["cached"] = "cached"
    """Name in the registry."""
    k: PositiveInt = 64
    """Tokens kept per position, draws included, about 1.9 bytes each."""
    draws: NonNegativeInt | None = None
    """Those of them that are drawn from what is not among the likeliest; a quarter if unset. They
    free forward KL of bias; another loss does not read them and should be given 0."""
    cache: Annotated[Path | None, Field(exclude=True)] = None
    """Folder shared between runs; without one, the run's own, removed in the end. A cache proves
    by fingerprints whose it is, so the folder is no part of a run's identity or manifest."""

    @model_validator(mode="after")
    def _some_likeliest(self) -> Self:
        if self.draws is not None and self.draws >= self.k:
            raise ValueError(f"draws {self.draws} must be less than k {self.k}, which counts them")
        return self

    def targets(self, directory: Path, demand: Demand) -> "Cache":
        """See the base class; the checkpoint is loaded only if the cache lacks a block.

        Raises:
            ArtifactError: if the disk lacks space, or the cache is damaged.
            ModelError: if the cache is another teacher's.
        """
        from trt_kd.teachers.identity import identity_of
        from trt_kd.teachers.writing import write_cache

        identity = identity_of(directory, precision=demand.precision)
        if demand.vocabulary is not None and demand.vocabulary < identity.vocabulary:
            identity = identity.model_copy(update={"vocabulary": demand.vocabulary})
        online = OnlineTeacher(max_dropped_mass=self.max_dropped_mass)
        load = partial(online.targets, directory, demand)
        folder = self.cache or demand.work / "logits"
        return write_cache(folder, load, demand.blocks, contents=self.contents(identity))

    def contents(self, identity: "Identity") -> "Contents":
        """What its cache of the teacher with that ``identity`` holds."""
        from trt_kd.teachers.shards import Contents

        draws = self.k // 4 if self.draws is None else self.draws
        return Contents(k=self.k, draws=draws, identity=identity)

    def problem(self, loss: "KDLoss") -> str | None:
        """See the base class."""
        if self.draws and not loss.reads_draws:
            return (
                f"{loss.kind} does not read draws, of which there are {self.draws}: set draws to 0"
            )
        return loss.top_k_problem()

    def rehearsal(self) -> Self:
        """See the base class; a shared cache is the whole teacher's."""
        return self.model_copy(update={"cache": None})
