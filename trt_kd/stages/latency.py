"""Build the latency table: time a designed set of sizes on the runtime that ships, once.

Probes are plain cuts of the source at random places: a step takes as long whatever its weights
say. They are exported as the real thing is, timed in groups, in turns with the unpruned model, and
removed. A group survives a kill.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializeAsAny,
    model_validator,
)
from typing_extensions import Self

from trt_kd.architectures import architecture_of
from trt_kd.architectures.shape import ModelShape, read_shape
from trt_kd.artifacts import Artifact, claim_work, piece, work_directory, work_key, writing
from trt_kd.artifacts.environment import environment
from trt_kd.config import FolderName, StageConfig, build_plugin, plugin_field
from trt_kd.data.base import DataConfig
from trt_kd.errors import ModelError
from trt_kd.exporters import EXPORTERS
from trt_kd.exporters.base import Exporter
from trt_kd.latency.model import Fit
from trt_kd.latency.table import Cell, Lane, LatencyTable, Lengths, Row, drift_corrected
from trt_kd.measuring.progress import progress
from trt_kd.pruning import AXES
from trt_kd.pruning.base import Axis
from trt_kd.pruning.search import open_axes
from trt_kd.stages.benchmark import BatchSizes, BenchmarkConfig, Sweep, several
from trt_kd.stages.export import ExportConfig, export
from trt_kd.stages.probing import LEAST, probes
from trt_kd.stages.twins import CELLS, SOURCE, Stand


class Timing(StageConfig):
    """What to time and how: lanes, workload, number of sizes."""

    stage: ClassVar[str] = "latency"

    lanes: Annotated[
        dict[FolderName, plugin_field(EXPORTERS, Exporter)],  # type: ignore[valid-type]
        Field(min_length=1),
    ]
    """Exporters by a name of your own, such as ``int4: {kind: ort-genai, precision: int4}``."""
    batch_sizes: BatchSizes = (1, 4, 8)
    """Sequences decoded together; between them times are interpolated."""
    input_tokens: Sweep = 128
    """Prompt tokens of every sequence (ISL), or several; every combination is timed."""
    output_tokens: Sweep = 32
    """Tokens decoded for every sequence (OSL), end-of-text ignored, or several."""
    probes: Annotated[int, Field(ge=LEAST)] = 14
    """Sizes that are timed in every lane besides the unpruned model."""
    together: PositiveInt = 4
    """Probes that take turns with each other and the unpruned model; all are loaded at once."""
    warmup: NonNegativeInt = 1
    """Runs of every model and batch size that do not count."""
    repeats: PositiveInt = 3
    """Runs that count."""
    max_width_pruning: float = Field(default=0.5, gt=0, lt=1)
    """Largest share of any width that is cut; nothing is predicted beyond."""
    max_depth_pruning: float = Field(default=0.34, gt=0, lt=1)
    """Largest share of the layers that is cut."""
    data: DataConfig = DataConfig()
    """Text of the prompts, and of the comparison of the unpruned model's export with it."""
    seed: int = 0
    """Choice of sizes and order of the documents."""
    threads: PositiveInt | None = None
    """CPU threads of every runtime; None leaves the choice to the runtime."""

    @model_validator(mode="after")
    def _runs_here(self) -> Self:
        for name, lane in self.lanes.items():
            if not lane.executed:
                raise ValueError(f"lanes.{name}: {lane.kind} is not run here, so it is not timed")
        return self

    def outside(self) -> dict[str, str]:
        """Fingerprint of the text."""
        return self.data.outside()

    def rehearsal(self) -> Self:
        """The fewest probes of a two-layer twin, one short run each."""
        lanes = {name: lane.rehearsal() for name, lane in self.lanes.items()}
        few = {"input_tokens": 16, "output_tokens": 4, "warmup": 0, "repeats": 1, "probes": LEAST}
        wide = {"max_width_pruning": 0.9, "max_depth_pruning": 0.5}
        return self.model_copy(update=few | wide | {"lanes": lanes})

    @property
    def pairs(self) -> list[Lengths]:
        """Every combination of lengths."""
        both = product(several(self.input_tokens), several(self.output_tokens))
        return [Lengths(*pair) for pair in both]

    def along(self, axes: Sequence[Axis]) -> "LatencyConfig":
        """The same along ``axes``."""
        fields = {name: getattr(self, name) for name in Timing.model_fields}
        return LatencyConfig(axes=list(axes), **fields)

    def benchmark(self, group: int) -> BenchmarkConfig:
        """How the models of a group are timed; every group gets other text."""
        names = ("data", "batch_sizes", "input_tokens", "output_tokens", "warmup", "repeats")
        shared = {name: getattr(self, name) for name in (*names, "threads")}
        return BenchmarkConfig(**shared, seed=self.seed + group)


class LatencyConfig(Timing):
    """What to time, and along which axes."""

    axes: Annotated[
        list[Annotated[SerializeAsAny[Axis], BeforeValidator(partial(build_plugin, AXES))]],
        Field(min_length=1),
    ]
    """What a later search may shrink, sizes left out."""

    @model_validator(mode="after")
    def _serves_every_size(self) -> Self:
        if len(open_axes(self.axes)) < len(self.axes):
            raise ValueError("a latency table serves every size: leave out the sizes of the axes")
        if any(axis.unit == "tokens" for axis in self.axes):
            raise ValueError("a search compares models of one vocabulary: leave out vocab")
        return self

    def shapes(self, shape: ModelShape) -> list[ModelShape]:
        """The probes' sizes for a model of ``shape``.

        Raises:
            ModelError: if an axis is not the model's, or the axes have too few sizes.
        """
        architecture = architecture_of(shape.model_type)
        for axis in self.axes:
            architecture.check_axis(axis.kind, shape)
        return probes(
            self.axes,
            shape,
            list(self.lanes.values()),
            count=self.probes,
            limits=(self.max_width_pruning, self.max_depth_pruning),
            seed=self.seed,
        )


def latency(config: LatencyConfig, *, source: Artifact, out: Path) -> Artifact:
    """Time ``source`` and probes cut from it in every lane; write the table to ``out``.

    Raises:
        TrtKdError: if the axes, a lane or the text are unfit, or a model cannot be timed.
    """
    shape = read_shape(source.path)
    for name, lane in config.lanes.items():
        if problems := lane.check(shape, source.manifest.kind):
            raise ModelError(f"lanes.{name}: {problems[0]}", hint="choose another lane")
    shapes = config.shapes(shape)
    with writing(out, kind="latency", config=config, inputs={"source": source}) as draft:
        work = claim_work(work_directory(out), work_key(config, {"source": source.key}))
        subject = _Subject(config, source, shape, shapes)
        made = LatencyTable(
            hardware=environment(),
            source=vars(shape),
            lanes={name: subject.lane(name, work / name) for name in config.lanes},
        )
        made.save(draft.path)
        draft.metrics["lanes"] = {
            name: [
                lengths._asdict() | _told(fit)
                for lengths in made.lengths
                for fit in made.model(name, lengths=lengths).fits.values()
            ]
            for name in made.lanes
        }
    return Artifact.open(out, expect="latency")


def _told(fit: Fit) -> dict[str, Any]:
    return {
        "metric": fit.metric,
        "batch_size": fit.batch_size,
        "ms_per_unit": dict(fit.ms_per_unit),
        "median_error": fit.median_error,
        "max_error": fit.max_error,
    }


@dataclass(frozen=True)
class _Subject:
    """What is timed."""

    config: LatencyConfig
    source: Artifact
    shape: ModelShape
    shapes: list[ModelShape]

    def lane(self, name: str, work: Path) -> Lane:
        """Time everything in one lane, group by group."""
        config, lane = self.config, self.config.lanes[name]
        folder = work / SOURCE
        if not folder.is_dir():
            settings = ExportConfig(lane=lane, data=config.data, seed=config.seed)
            export(settings, source=self.source, out=folder)
        exported = Artifact.open(folder, expect="export")
        size = config.together
        starts = list(range(0, len(self.shapes), size))
        groups = [
            self._group(lane, exported, start, work) for start in progress(starts, f"timing {name}")
        ]
        return Lane(
            lane=lane.model_dump(mode="json"),
            backend=lane.backend,
            kl_nats=float(exported.metrics["logits_kl_nats"]),  # type: ignore[arg-type]
            rows=drift_corrected(groups),
        )

    def _group(
        self, lane: Exporter, exported: Artifact, start: int, work: Path
    ) -> tuple[list[Cell], list[Row]]:
        """Time the probes from ``start`` on, unless that was done before the last kill."""
        config = self.config
        shapes = {
            f"probe-{start + i}": shape
            for i, shape in enumerate(self.shapes[start : start + config.together])
        }

        def make(folder: Path) -> Any:
            stand = Stand(lane, self.source, exported, config.axes)
            group = config.benchmark(start // config.together)
            return CELLS.dump_python(stand.time(shapes, group, folder))

        cells = CELLS.validate_python(piece(work / f"group-{start}", make))
        rows = [
            Row(sizes=shape.changes(self.shape), cells=cells[name])
            for name, shape in shapes.items()
        ]
        return cells[SOURCE], rows
