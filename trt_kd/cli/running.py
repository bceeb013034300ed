"""Commands over a whole recipe: run, plan, rehearse, gate."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trt_kd.cli.console import JsonOption, duration, print_json, size, table

if TYPE_CHECKING:
    from trt_kd.pipeline.plan import Plan

RecipeFile = Annotated[Path, typer.Argument(help="Recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the recipe, such as distill.steps=20.", show_default=False),
]
OutOption = Annotated[Path, typer.Option(help="Folder that holds a folder for every run.")]

VERDICT_EXIT_CODES = {"pass": 0, "fail": 1, "undecided": 3}


def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: OutOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Run a recipe: skip what is done, resume what was cut off, print the report's table.

    Example: trt-kd run workflows/quickstart.yaml distill.steps=20 --out runs
    """
    from trt_kd.pipeline.recipe import load_recipe
    from trt_kd.pipeline.run import run as run_recipe
    from trt_kd.reporting.summary import console_table
    from trt_kd.stages.report import read_report

    loaded = load_recipe(recipe, overrides or ())
    artifacts = run_recipe(loaded, out / loaded.name)
    report = artifacts["report"].path
    if as_json:
        print_json(json.loads((report / "report.json").read_text(encoding="utf-8")))
        return
    print(console_table(read_report(report)))
    print(f"\nreport: {report / 'report.html'}")


def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: OutOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Print every step of a recipe, done or to do, with what it will cost; change nothing.

    Example: trt-kd plan workflows/llama3.1-8b-to-4b-width-fp8.yaml --json
    """
    from trt_kd.pipeline.plan import make_plan
    from trt_kd.pipeline.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    made = make_plan(loaded, out / loaded.name)
    if as_json:
        print_json(_as_json(made))
    else:
        _print_plan(made)


def rehearse(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: OutOption = Path("runs"),
) -> None:
    """Run the whole recipe on a two-layer twin, every stage for real, in a minute or two.

    What would fail in hour three fails now. Example: trt-kd rehearse workflows/quickstart.yaml
    """
    from trt_kd.pipeline.recipe import load_recipe
    from trt_kd.pipeline.run import rehearse as rehearse_recipe

    loaded = load_recipe(recipe, overrides or ())
    artifacts = rehearse_recipe(loaded, out / loaded.name / "rehearsal")
    print(f"rehearsal passed: {len(artifacts)} steps of {loaded.name}")


def gate(
    report: Annotated[Path, typer.Argument(help="Folder of a report.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Print a report's verdict; exit code 0 pass, 1 fail, 3 undecided.

    Example: trt-kd gate runs/quickstart/report && deploy
    """
    from trt_kd.stages.report import read_report

    found = read_report(report)
    if as_json:
        print_json(found.model_dump(mode="json", include={"verdict", "gates"}))
    else:
        print(found.verdict)
        for each in found.gates:
            print(f"  {each.verdict:<9}  {each.name}: {each.value} (limit {each.limit})")
    raise typer.Exit(VERDICT_EXIT_CODES[found.verdict])


def _print_plan(made: "Plan") -> None:
    rows = [["step", "stage", "state", "key", "time", "memory", "disk"]]
    for planned in made.steps:
        cost = planned.estimate
        rows.append(
            [
                planned.step.name,
                planned.step.stage,
                planned.state,
                planned.key[:12],
                duration(cost.time_s),
                size(cost.memory_bytes),
                size(cost.disk_bytes),
            ]
        )
    print(table(rows))
    teacher, student = made.shapes.teacher, made.shapes.student
    if teacher is not None and student is not None:
        share = student.parameters / teacher.parameters
        print(
            f"\nteacher {teacher.parameters:,} parameters, student {student.parameters:,} "
            f"({share:.1%})"
        )
    for warning in made.warnings:
        print(f"warning: {warning}")
    totals = _totals(made)
    print(
        f"to do: {len(made.to_do)} of {len(made.steps)} steps, on this machine about "
        f"{duration(totals['time_s'])}, at most {size(totals['memory_bytes'])} of memory, "
        f"{size(totals['disk_bytes'])} of disk"
    )


def _totals(made: "Plan") -> dict[str, float | None]:
    costs = [planned.estimate for planned in made.to_do]
    if any(cost.time_s is None for cost in costs):
        return {"time_s": None, "memory_bytes": None, "disk_bytes": None}
    return {
        "time_s": sum(cost.time_s or 0.0 for cost in costs),
        "memory_bytes": max((cost.memory_bytes or 0.0 for cost in costs), default=0.0),
        "disk_bytes": sum(cost.disk_bytes or 0.0 for cost in costs),
    }


def _as_json(made: "Plan") -> dict[str, Any]:
    shapes = {"teacher": made.shapes.teacher, "student": made.shapes.student}
    return {
        "root": str(made.root),
        "models": {
            role: None if shape is None else {**vars(shape), "parameters": shape.parameters}
            for role, shape in shapes.items()
        },
        "to_do": _totals(made),
        "warnings": list(made.warnings),
        "steps": [
            {
                "name": planned.step.name,
                "stage": planned.step.stage,
                "state": planned.state,
                "key": planned.key,
                "inputs": dict(planned.step.inputs),
                "estimate": vars(planned.estimate),
            }
            for planned in made.steps
        ],
    }
