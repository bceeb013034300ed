"""The recipe: one strict YAML file that says everything a run does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator
from typing_extensions import Self

from trt_kd.config import (
    FolderName,
    StageConfig,
    StrictModel,
    apply_overrides,
    plugin_field,
    read_yaml,
    validate,
)
from trt_kd.data.base import DataConfig
from trt_kd.errors import ConfigError
from trt_kd.exporters import EXPORTERS
from trt_kd.exporters.base import Exporter
from trt_kd.pipeline.correction import Correction
from trt_kd.pruning.latency_limit import LatencyLimit
from trt_kd.reporting.gates import Gate
from trt_kd.stages.benchmark import BenchmarkConfig
from trt_kd.stages.distill import DistillConfig
from trt_kd.stages.evaluate import EvaluateConfig
from trt_kd.stages.import_model import ImportConfig
from trt_kd.stages.latency import Timing
from trt_kd.stages.prune import PruneConfig
from trt_kd.stages.quantize import QuantizeConfig

M = TypeVar("M", bound=BaseModel)


class ExportSpec(StrictModel):
    """One way out: an export lane, with a quantization before it where the lane needs one."""

    lane: plugin_field(EXPORTERS, Exporter)  # type: ignore[valid-type]
    """The exporter and its options."""
    quantize: QuantizeConfig | None = None
    """Quantize with Model Optimizer first; null where the lane quantizes by itself or not."""
    verify_blocks: int = Field(default=4, ge=1)
    """Held-out blocks on which the export's logits are compared with its source's."""


class ExportSection(StrictModel):
    """What is written for which runtime."""

    deploy: ExportSpec
    """What ships: the teacher and the student both go through it."""
    baseline: ExportSpec | None = None
    """The unquantized lane to compare with; null measures the checkpoints themselves."""
    also: dict[FolderName, ExportSpec] = {}
    """Further exports of the student, by name."""


class Recipe(StrictModel):
    """Import, prune, distill, export, evaluate, benchmark, report: one section each."""

    model_config = ConfigDict(populate_by_name=True)

    schema_version: Literal[1] = 1
    """Version of this layout."""
    name: FolderName
    """Folder of the run below the output folder."""
    title: str = ""
    """Heading of the report; the name where empty."""
    seed: NonNegativeInt = 0
    """Seed of every section that does not set its own."""
    data: DataConfig = DataConfig()
    """Text of every section that does not set its own."""
    import_: ImportConfig = Field(alias="import")
    """The teacher."""
    correct: Correction | None = None
    """Adapt the teacher to the text of ``distill`` before all else; null leaves it as it is."""
    assistants: list[PruneConfig] = []
    """Cuts on the way, the largest first: each is distilled like the student, and the next model is
    cut from it and taught by it."""
    latency: Timing | None = None
    """What is timed for cuts whose budget limits time, along their open axes; null without such."""
    prune: PruneConfig
    """What to cut."""
    distill: DistillConfig
    """How to recover."""
    cross_entropy_control: bool = True
    """Also train the pruned model on plain cross-entropy with the same tokens."""
    export: ExportSection
    """What is written for which runtime."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """How quality is measured."""
    benchmark: BenchmarkConfig | None = None
    """How speed is measured; null where the lane's runtime is not on this machine."""
    gates: list[Gate] = []
    """Limits that decide release."""

    @model_validator(mode="after")
    def _one_vocabulary(self) -> Self:
        cuts = [*self.assistants, self.prune]
        if any(axis.kind == "vocab" for cut in cuts for axis in cut.axes):
            raise ValueError(
                "prune.axes: vocab changes the tokens, and teacher and student must share them; "
                "cut the vocabulary first (trt-kd prune) and import the result as the teacher"
            )
        return self

    @model_validator(mode="after")
    def _the_teacher_is_a_checkpoint(self) -> Self:
        if not self.distill.teacher.needs_checkpoint:
            for name in ("correct", "assistants"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} has no effect on a {self.distill.teacher.kind} teacher: leave it "
                        "out, or choose another kind of distill.teacher"
                    )
        return self

    @model_validator(mode="after")
    def _times_are_used(self) -> Self:
        budgets = [cut.budget for cut in [*self.assistants, self.prune]]
        limits = [each.latency for each in budgets if each is not None and each.latency is not None]
        if limits and self.latency is None:
            raise ValueError(
                "prune.budget.latency needs measured times: add a section latency with the lanes, "
                "such as {lanes: {int4: ort-genai}}"
            )
        if self.latency is not None and not limits:
            raise ValueError("latency has no effect: no budget limits time; leave it out")
        if self.latency is not None:
            for limit in limits:
                _check_lengths(limit, self.latency)
        return self

    @model_validator(mode="after")
    def _names_are_free(self) -> Self:
        taken = sorted({"baseline", "deploy", "quantized"} & set(self.export.also))
        if taken:
            raise ValueError(f"export.also: the name {taken[0]!r} is taken; choose another")
        return self

    def resolved(self) -> "Recipe":
        """Give ``data`` and ``seed`` to every section that does not set its own."""
        shared = {"data": self.data, "seed": self.seed}
        return _inherit(self, shared)

    def rehearsal(self) -> "Recipe":
        """The same recipe with the least work that passes through every line."""
        return _rehearsed(self)


def _check_lengths(limit: LatencyLimit, timing: Timing) -> None:
    """Raise a ValueError if ``timing`` does not measure what ``limit`` means."""
    try:
        limit.lengths(timing.pairs)
    except ConfigError as error:
        raise ValueError(f"{error.args[0]}: {error.hint}") from error


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override, validate and resolve the recipe at ``path``.

    Raises:
        ConfigError: naming every problem by its dotted path.
    """
    settings = apply_overrides(read_yaml(path), list(overrides))
    return validate(Recipe, settings, where=str(path)).resolved()


def _inherit(section: M, shared: dict[str, Any]) -> M:
    """Copy ``section`` with the shared values in every stage's settings that left them out."""
    update: dict[str, Any] = {}
    top = isinstance(section, Recipe)
    for name in type(section).model_fields:
        value = getattr(section, name)
        if name in shared and not top and name not in section.model_fields_set:
            update[name] = shared[name]
        elif _has_sections(value):
            update[name] = _inherit(value, shared)
        elif isinstance(value, list):
            update[name] = [
                _inherit(item, shared) if _has_sections(item) else item for item in value
            ]
        elif isinstance(value, dict):
            update[name] = {
                key: _inherit(item, shared) if _has_sections(item) else item
                for key, item in value.items()
            }
    return section.model_copy(update=update)


def _has_sections(value: object) -> bool:
    return isinstance(value, StrictModel) and not isinstance(value, DataConfig)


def _rehearsed(section: M) -> M:
    """Copy ``section`` with every stage's settings, however deep, replaced by its rehearsal."""
    update: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, dict):
            update[name] = {
                key: _rehearsed(item) if isinstance(item, StrictModel) else item
                for key, item in value.items()
            }
        elif isinstance(value, list):
            update[name] = [
                item.rehearsal() if isinstance(item, StageConfig) else item for item in value
            ]
        elif hasattr(value, "rehearsal"):
            update[name] = value.rehearsal()
        elif isinstance(value, ExportSection | ExportSpec):
            update[name] = _rehearsed(value)
    if "verify_blocks" in type(section).model_fields:
        update["verify_blocks"] = 1
    return section.model_copy(update=update)
