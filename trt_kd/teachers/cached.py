"""The teacher runs once over the training text; its likeliest tokens are kept on disk."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt
from typing_extensions import Self

from trt_kd.teachers.base import Demand, Teacher
from trt_kd.teachers.online import OnlineTeacher

if TYPE_CHECKING:
    from trt_kd.losses.base import KDLoss
    from trt_kd.teachers.cache import Cache


class CachedTeacher(Teacher):
    """Write the teacher's top-k log-probabilities and tail mass once, then train without it."""

    kind: Literal["cached"] = "cached"
    """Name in the registry."""
    k: PositiveInt = 64
    """Tokens kept per position, about 1.9 bytes each; all others are one bucket of the loss."""
    cache: Annotated[Path | None, Field(exclude=True)] = None
    """Folder shared between runs; without one, the run's own, removed in the end. A cache proves
    by fingerprints whose it is, so the folder is no part of a run's identity or manifest."""

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
        return write_cache(folder, load, demand.blocks, k=self.k, identity=identity)

    def problem(self, loss: "KDLoss") -> str | None:
        """See the base class."""
        return loss.top_k_problem()

    def rehearsal(self) -> Self:
        """See the base class; a shared cache is the whole teacher's."""
        return self.model_copy(update={"cache": None})
