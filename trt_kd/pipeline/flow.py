"""The flow: which steps a recipe asks for, in order, with their inputs.

Six roles stand in every report: the teacher, the teacher quantized (the first thing a sceptic
asks for), the pruned model untrained, the same trained on plain cross-entropy, the distilled
student, and the student quantized; a corrected teacher is a seventh. All are held against the
teacher as it was imported.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from trt_kd.config import StageConfig
from trt_kd.pipeline.recipe import ExportSpec, Recipe
from trt_kd.pruning.search import open_axes
from trt_kd.stages.benchmark import BenchmarkConfig
from trt_kd.stages.export import ExportConfig
from trt_kd.stages.prune import PruneConfig
from trt_kd.stages.report import ReportConfig
from trt_kd.stages.score import scoring_of


@dataclass(frozen=True)
class Step:
    """One stage with its settings, the steps it reads from and the name of its folder."""

    name: str
    config: StageConfig
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def stage(self) -> str:
        """Name of the stage."""
        return self.config.stage


def steps(recipe: Recipe) -> list[Step]:
    """Every step of ``recipe``, each after the steps it reads from."""
    made = list(_training(recipe))
    made += _exports(recipe, "teacher")
    made += _exports(recipe, "student")
    for name, spec in recipe.export.also.items():
        made += _export(recipe, spec, "student", name)
    made += _evaluations(recipe)
    if recipe.benchmark is not None:
        made.append(Step("benchmark", recipe.benchmark, timed_roles(recipe)))
    made.append(_report(recipe, made))
    return made


def without_cut(made: Sequence[Step], why: str) -> list[Step]:
    """The steps of ``made`` that do not build on what would have been pruned.

    The unpruned model is still exported, measured and reported; ``why`` stands on the report.
    """
    gone, left = {"pruned"}, []
    for step in made:
        inputs = {role: name for role, name in step.inputs.items() if name not in gone}
        if step.name in gone or (
            len(inputs) < len(step.inputs) and step.stage not in ("benchmark", "report")
        ):
            gone.add(step.name)
            continue
        left.append(replace(step, config=_narrowed(step.config, inputs, why), inputs=inputs))
    return left


def _narrowed(config: StageConfig, inputs: Mapping[str, str], why: str) -> StageConfig:
    """``config`` without the runtimes of variants that are gone; a report says ``why``."""
    if isinstance(config, BenchmarkConfig):
        backends = {name: each for name, each in config.backends.items() if name in inputs}
        return config.model_copy(update={"backends": backends})
    if isinstance(config, ReportConfig):
        return config.model_copy(update={"notes": [*config.notes, why]})
    return config


def _training(recipe: Recipe) -> Iterator[Step]:
    yield Step("teacher", recipe.import_)
    source = "teacher"
    if recipe.correct is not None:
        yield Step("corrected", recipe.correct.training(recipe.distill.data), {"student": source})
        source = "corrected"
    for number, cut in enumerate(recipe.assistants, start=1):
        name = f"assistant-{number}"
        yield from _cut(recipe, cut, source, prefix=f"{name}-")
        yield Step(name, recipe.distill, {"teacher": source, "student": f"{name}-pruned"})
        source = name
    yield from _cut(recipe, recipe.prune, source)
    teacher = {"teacher": source} if recipe.distill.teacher.needs_checkpoint else {}
    yield Step("student", recipe.distill, {**teacher, "student": "pruned"})
    if recipe.cross_entropy_control:
        yield Step("cross_entropy", recipe.distill.cross_entropy(), {"student": "pruned"})


def _cut(recipe: Recipe, cut: PruneConfig, source: str, prefix: str = "") -> Iterator[Step]:
    """The step that cuts ``source``, after the scores and measured times that it needs."""
    inputs = {"source": source}
    if cut.searching:
        inputs["scores"] = f"{prefix}scores"
        yield Step(inputs["scores"], scoring_of(cut), {"source": source})
    if recipe.latency is not None and cut.is_timed:
        inputs["latency"] = f"{prefix}latency"
        yield Step(inputs["latency"], recipe.latency.along(open_axes(cut.axes)), {"source": source})
    yield Step(f"{prefix}pruned", cut, inputs)


def _exports(recipe: Recipe, role: str) -> Iterator[Step]:
    if recipe.export.baseline is not None:
        yield from _export(recipe, recipe.export.baseline, role, "baseline")
    yield from _export(recipe, recipe.export.deploy, role, "deploy")


def _export(recipe: Recipe, spec: ExportSpec, role: str, name: str) -> Iterator[Step]:
    source = role
    if spec.quantize is not None:
        source = f"{role}-{name}-quantized"
        yield Step(source, spec.quantize, {"source": role})
    config = ExportConfig(
        lane=spec.lane, data=recipe.data, verify_blocks=spec.verify_blocks, seed=recipe.seed
    )
    yield Step(f"{role}-{name}", config, {"source": source})


def _evaluations(recipe: Recipe) -> Iterator[Step]:
    for role, step in measured_roles(recipe).items():
        inputs = {"model": step, "teacher": "teacher"}
        yield Step(f"evaluate-{role}", recipe.evaluate, inputs)


def measured_roles(recipe: Recipe) -> dict[str, str]:
    """The step whose artifact stands for each role's quality."""
    measured = {
        "teacher": "teacher",
        "teacher_quantized": "teacher-deploy",
        "corrected": "corrected",
        "pruned": "pruned",
        "cross_entropy": "cross_entropy",
        "student": "student",
        "student_quantized": "student-deploy",
    }
    if recipe.correct is None:
        del measured["corrected"]
    if not recipe.cross_entropy_control:
        del measured["cross_entropy"]
    return measured


def timed_roles(recipe: Recipe) -> dict[str, str]:
    """The four corners: base and pruned, unquantized and quantized."""
    suffix = "-baseline" if recipe.export.baseline is not None else ""
    return {
        "teacher": f"teacher{suffix}",
        "teacher_quantized": "teacher-deploy",
        "student": f"student{suffix}",
        "student_quantized": "student-deploy",
    }


def _report(recipe: Recipe, made: list[Step]) -> Step:
    inputs: dict[str, str] = {}
    corners = timed_roles(recipe)
    for role in measured_roles(recipe):
        inputs[f"{role}.model"] = role.removesuffix("_quantized")
        inputs[f"{role}.evaluation"] = f"evaluate-{role}"
        if role in corners and corners[role] != role:
            inputs[f"{role}.shipped"] = corners[role]
    for name in recipe.export.also:
        inputs[f"export.student-{name}"] = f"student-{name}"
    if any(step.name == "benchmark" for step in made):
        inputs["benchmark"] = "benchmark"
    config = ReportConfig(
        title=recipe.title or recipe.name,
        gates=recipe.gates,
        recipe=recipe.model_dump(mode="json", by_alias=True),
    )
    return Step("report", config, inputs)
