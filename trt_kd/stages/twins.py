"""Models that are only timed: sizes as asked for, exported, never compared and never kept."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from trt_kd.architectures.shape import ModelShape
from trt_kd.artifacts import Artifact, writing
from trt_kd.data.base import DataConfig
from trt_kd.errors import ModelError
from trt_kd.exporters.base import Exporter
from trt_kd.latency.table import Cell
from trt_kd.pruning.base import Axis
from trt_kd.pruning.importance import Activation, Random
from trt_kd.pruning.sizes import settled
from trt_kd.stages.benchmark import BenchmarkConfig, measured
from trt_kd.stages.export import ExportConfig

SOURCE = "source"
"""Name of the unpruned model among those that are timed."""
CELLS = TypeAdapter(dict[str, list[Cell]])
"""Writes and reads what ``Stand.time`` found."""


def twin(
    source: Artifact, shape: ModelShape, axes: Sequence[Axis], data: DataConfig, out: Path
) -> Artifact:
    """A checkpoint of ``shape``: the plain cut of ``source`` at random places."""
    from trt_kd.stages.prune import PruneConfig, prune  # which may come here to measure

    ranks = any(axis.unit == "channels" for axis in axes)
    config = PruneConfig(
        axes=settled(axes, shape),
        importance=Random() if ranks else Activation(),
        reconstruct=None,
        calibration_tokens=data.block_tokens,
        data=data,
    )
    return prune(config, source=source, out=out)


def untested_export(lane: Exporter, source: Artifact, out: Path) -> Artifact:
    """``source`` in ``lane``, laid out as what ships, with weights that need not be good."""
    quick = lane.rehearsal()
    if (basis := quick.basis()) is not None:
        source = untested_export(basis, source, out.with_name(f"{out.name}-{basis.kind}"))
    config = ExportConfig(lane=quick)
    with writing(out, kind="export", config=config, inputs={"source": source}) as draft:
        draft.metrics |= quick.export(source, draft.path)
    return Artifact.open(out, expect="export")


@dataclass(frozen=True)
class Stand:
    """What twins are cut from, and what they take turns with."""

    lane: Exporter
    source: Artifact
    exported: Artifact
    """The unpruned model in that lane."""
    axes: Sequence[Axis]

    def time(
        self, shapes: Mapping[str, ModelShape], config: BenchmarkConfig, work: Path
    ) -> dict[str, list[Cell]]:
        """Time twins of ``shapes``; they are made in the folder ``work`` and removed again.

        Returns, by name and as ``source`` for the unpruned model, the cells of every workload.

        Raises:
            ModelError: if a batch size needs more memory than there is.
        """
        variants = {SOURCE: self.exported}
        for name, shape in shapes.items():
            cut = twin(self.source, shape, self.axes, config.data, work / f"{name}-cut")
            variants[name] = untested_export(self.lane, cut, work / name)
        made = measured(config, variants, work / "timed")
        text = (made.path / "benchmark.json").read_text(encoding="utf-8")
        records = json.loads(text)["variants"]
        shutil.rmtree(work)
        work.mkdir()
        return {name: [_cell(name, record) for record in rows] for name, rows in records.items()}


def _cell(name: str, record: Mapping[str, Any]) -> Cell:
    if "error" in record:
        raise ModelError(
            f"{name} cannot be timed at batch size {record['batch_size']}: {record['error']}",
            hint="leave that batch size out",
        )
    return Cell.model_validate({field: record[field] for field in Cell.model_fields})
