"""The plan: every step with its key, whether it is done, what it will cost and what forbids it.

Nothing here loads a model: what can be refused from settings and ``config.json`` is refused now.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from trt_kd.architectures.shape import ModelShape
from trt_kd.artifacts import MANIFEST, Artifact, work_directory, work_key
from trt_kd.backends.choosing import check_names
from trt_kd.errors import ArtifactError, ConfigError, ModelError
from trt_kd.pipeline.estimate import Estimate, Shapes, estimate
from trt_kd.pipeline.flow import Step, measured_roles, steps, timed_roles
from trt_kd.pipeline.recipe import ExportSpec, Recipe
from trt_kd.reporting.gates import unmet_needs

State = Literal["done", "to do", "to resume", "to restore"]
SUPERSEDED = "superseded"
SMALLEST_SHARE = 0.25
"""Parameters of a student by its teacher's below which imitation is known to suffer."""


@dataclass(frozen=True)
class PlannedStep:
    """A step, its identity, its state on disk and its estimated cost."""

    step: Step
    key: str
    state: State
    out: Path
    estimate: Estimate


@dataclass(frozen=True)
class Plan:
    """What ``run`` would do."""

    root: Path
    steps: list[PlannedStep]
    shapes: Shapes
    warnings: tuple[str, ...] = ()
    """What is likely to disappoint."""

    @property
    def to_do(self) -> list[PlannedStep]:
        """The steps that are not done."""
        return [planned for planned in self.steps if planned.state != "done"]


def make_plan(recipe: Recipe, root: Path) -> Plan:
    """Plan ``recipe`` with its artifacts below ``root``.

    Raises:
        ConfigError, ModelError: if a step could not succeed, whatever is computed before it.
    """
    check_gates(recipe)
    if recipe.benchmark is not None:
        check_names(recipe.benchmark.backends, timed_roles(recipe))
    shapes = planned_shapes(recipe)
    if shapes.teacher is not None:
        check(recipe, shapes)
    planned = planned_steps(steps(recipe), root, shapes)
    return Plan(root, planned, shapes, tuple(_gaps(recipe, shapes)))


def planned_steps(made: Sequence[Step], root: Path, shapes: Shapes) -> list[PlannedStep]:
    """Every step of ``made`` with its key, its state below ``root`` and what it will cost."""
    keys: dict[str, str] = {}
    planned = []
    for step in made:
        inputs = {role: keys[name] for role, name in step.inputs.items()}
        keys[step.name] = work_key(step.config, inputs)
        out = root / step.name
        state = _state(out, keys[step.name])
        cost = estimate(step, shapes)
        planned.append(PlannedStep(step, keys[step.name], state, out, cost))
    return planned


def planned_shapes(recipe: Recipe) -> Shapes:
    """Sizes of teacher and student, as far as they can be told now."""
    teacher = recipe.import_.known_shape()
    if teacher is None:
        return Shapes(None, None)
    return Shapes(teacher, recipe.prune.planned(_assistants(recipe, teacher)[-1]))


def _assistants(recipe: Recipe, teacher: ModelShape) -> list[ModelShape]:
    """Shapes of the teacher and of every assistant after it."""
    shapes = [teacher]
    for cut in recipe.assistants:
        shapes.append(cut.planned(shapes[-1]))
    return shapes


def _gaps(recipe: Recipe, shapes: Shapes) -> Iterator[str]:
    """Warn of students much smaller than what teaches them (arXiv:1902.03393)."""
    if shapes.teacher is None or shapes.student is None:
        return
    chain = [*_assistants(recipe, shapes.teacher), shapes.student]
    names = [f"assistant-{number}" for number in range(1, len(chain) - 1)]
    taught = zip([*names, "student"], pairwise(chain), strict=True)
    for name, (teacher, student) in taught:
        share = student.parameters / teacher.parameters
        if share < SMALLEST_SHARE:
            yield (
                f"{name} has {share:.0%} of the parameters of what teaches it; under "
                f"{SMALLEST_SHARE:.0%} an assistant between the two usually pays: see assistants"
            )


def check_gates(recipe: Recipe) -> None:
    """Refuse a gate that this recipe would never give a number to.

    Raises:
        ConfigError: naming every such gate.
    """
    problems = unmet_needs(recipe.gates, roles=measured_roles(recipe), tasks=recipe.evaluate.tasks)
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} gate(s) could never be decided:{lines}")


def check(recipe: Recipe, shapes: Shapes) -> None:
    """Ask every exporter and format whether it can take these sizes.

    Raises:
        ModelError: naming every problem at once.
    """
    teacher, student = shapes.teacher, shapes.student
    if teacher is None or student is None:
        raise ConfigError("the model's sizes are not known", hint="give import.expect")
    problems: list[str] = []
    section = recipe.export
    problems += [
        f"export.{name}: {spec.lane.kind} is not run here, so what it ships can be neither "
        "evaluated nor timed; put it below export.also"
        for name, spec in (("deploy", section.deploy), ("baseline", section.baseline))
        if spec is not None and not spec.lane.executed
    ]
    for role, shape in (("teacher", teacher), ("student", student)):
        problems += _problems(f"export.deploy ({role})", section.deploy, shape)
        if section.baseline is not None:
            problems += _problems(f"export.baseline ({role})", section.baseline, shape)
    for name, spec in section.also.items():
        problems += _problems(f"export.also.{name}", spec, student)
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ModelError(f"{len(problems)} export(s) cannot be made:{lines}")


def _problems(where: str, spec: ExportSpec, shape: ModelShape) -> list[str]:
    if spec.quantize is None:
        found = spec.lane.check(shape, "checkpoint")
    else:
        quantization = spec.quantize.format
        found = spec.quantize.check(shape) + (
            spec.lane.check(shape, "quantized") or spec.lane.check_format(shape, quantization)
        )
    return [f"{where}: {text}" for text in found]


def _state(out: Path, key: str) -> State:
    if (out / MANIFEST).is_file():
        try:
            done = Artifact.open(out).key == key
        except ArtifactError:
            done = False
        if done:
            return "done"
    if (superseded(out, key) / MANIFEST).is_file():
        return "to restore"
    return "to resume" if work_directory(out).is_dir() else "to do"


def superseded(out: Path, key: str) -> Path:
    """Where an artifact goes that another recipe's takes the place of."""
    return out.parent / SUPERSEDED / f"{out.name}-{key[:12]}"
