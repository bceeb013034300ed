"""What every exporter does: check a shape, write a directory, say how far it may stray."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import Self

from trt_kd.architectures.shape import ModelShape
from trt_kd.artifacts import Artifact, Kind
from trt_kd.artifacts.manifest import Metric
from trt_kd.config import Plugin
from trt_kd.quantization.base import QuantizationFormat

if TYPE_CHECKING:
    from trt_kd.backends.base import Backend


class Exporter(Plugin, ABC):
    """A lane: an export format with the runtime that reads it."""

    backend: ClassVar[str]
    """Name of the backend that reads the export back."""

    @property
    def executed(self) -> bool:
        """Whether that backend runs what ships on this machine, and not only what is below it."""
        return True

    def reader(self) -> "Backend":
        """The backend that reads the export back, with its settings."""
        from trt_kd.backends import BACKENDS

        return BACKENDS.load(self.backend).model_validate({"kind": self.backend})

    @abstractmethod
    def check(self, shape: ModelShape, source_kind: Kind) -> list[str]:
        """Problems with a source of this shape and kind, as text; needs no weights and no GPU."""

    def check_format(self, shape: ModelShape, quantization: QuantizationFormat) -> list[str]:
        """Problems with a model of this shape in that number format, as text; by default none."""
        return []

    def check_source(self, source: Artifact) -> list[str]:
        """Problems that ``config.json`` and the manifest tell and sizes alone do not, as text."""
        return []

    def basis(self) -> "Exporter | None":
        """Lane whose finished export this one is made from, instead of from the model itself.

        It is written and verified first and stays beside ``out`` until this lane is done.
        """
        return None

    @abstractmethod
    def export(self, source: Artifact, out: Path) -> dict[str, Metric]:
        """Write ``source`` in this lane's format into the existing directory ``out``.

        Returns what is worth recording about the files written.

        Raises:
            MissingDependencyError: if a package this lane needs is not installed.
            ModelError: if the source is damaged or the lane's own tool refuses it.
        """

    @abstractmethod
    def problems(self, source: Artifact, out: Path) -> list[str]:
        """What the written files themselves say against the export, before any model is run."""

    def rehearsal(self) -> Self:
        """The same lane without what costs time and decides nothing but the weights' values."""
        return self

    @abstractmethod
    def kl_limit_nats(self, source: Artifact) -> float:
        """Largest mean KL per token that the export of ``source`` may have to it."""
