"""A student cut to a latency beside one cut to a share of the parameters.

    python benchmarks/latency_or_params.py TEACHER --latency STUDENT --params STUDENT

Measures the KL to the teacher of both on held-out text, before and after distillation by the same
recipe on the same tokens, and the time between tokens of both and of the teacher, in turns, in the
format that ships. What is finished in the work folder is not made again. Prints a table, then one
line of JSON; differences are latency minus parameters, with 95 % intervals over held-out blocks.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml
from search_quality import RECIPE, made
from showing import shown

from trt_kd.artifacts import Artifact
from trt_kd.artifacts.environment import environment
from trt_kd.config import build_plugin
from trt_kd.exporters import EXPORTERS
from trt_kd.measuring.statistics import mean_interval
from trt_kd.pipeline.recipe import Recipe, load_recipe
from trt_kd.reporting.comparison import compare
from trt_kd.stages.benchmark import BenchmarkConfig, benchmark
from trt_kd.stages.distill import distill
from trt_kd.stages.evaluate import evaluate
from trt_kd.stages.twins import untested_export

LANE = {"kind": "ort-genai", "precision": "int4"}
TEACHER, LATENCY, PARAMS = "teacher", "latency", "params"
STUDENTS = (LATENCY, PARAMS)
MOMENTS = ("before", "after")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="cut to a latency, or to a parameter count")
    parser.add_argument("teacher", type=Path, help="checkpoint artifact")
    parser.add_argument("--latency", type=Path, required=True, help="cut under budget.latency")
    parser.add_argument("--params", type=Path, required=True, help="cut under budget.params")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="for the distillation")
    parser.add_argument("--work", type=Path, default=Path("runs/latency-or-params"))
    parser.add_argument(
        "--lane", type=yaml.safe_load, default=LANE, help="exporter, as in a recipe"
    )
    parser.add_argument("--blocks", type=int, default=48, help="of held-out text")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=6)
    given = parser.parse_args(arguments)
    return shown(lambda: compared(given), table)


def compared(given: argparse.Namespace) -> dict[str, Any]:
    """Distil both alike, measure both before and after, time them."""
    recipe = load_recipe(given.recipe)
    models = {
        name: Artifact.open(getattr(given, name), expect="checkpoint")
        for name in (TEACHER, *STUDENTS)
    }
    teacher = models[TEACHER]
    times = timed(given, models)
    found: dict[str, dict[str, Any]] = {moment: {} for moment in MOMENTS}
    for name in STUDENTS:
        after = made(
            given.work / f"{name}-distilled",
            recipe.distill,
            distill,
            student=models[name],
            teacher=teacher,
        )
        for moment, model in zip(MOMENTS, (models[name], after), strict=True):
            place = given.work / f"evaluate-{name}-{moment}"
            found[moment][name] = blocks_of(given, recipe, model, teacher, place)
    return {
        "hardware": environment(),
        "lane": given.lane,
        "batch_size": given.batch,
        "input_tokens": given.input_tokens,
        "output_tokens": given.output_tokens,
        "distillation_tokens": recipe.distill.tokens,
        "heldout_blocks": given.blocks,
        "sizes": {name: models[name].metrics["kept_sizes"] for name in STUDENTS},
        "parameters_share": {name: models[name].metrics["parameters_share"] for name in STUDENTS},
        "itl_over_teacher": times,
        **{moment: divergence(found[moment]) for moment in MOMENTS},
    }


def timed(given: argparse.Namespace, models: dict[str, Artifact]) -> dict[str, Any]:
    """Time between tokens of both students over the teacher's, with intervals over runs."""
    lane = build_plugin(EXPORTERS, given.lane)
    exported = {}
    for name, model in models.items():
        place = given.work / f"exported-{name}"
        exported[name] = (
            Artifact.open(place) if place.is_dir() else untested_export(lane, model, place)
        )
    config = BenchmarkConfig(
        batch_sizes=(given.batch,),
        input_tokens=given.input_tokens,
        output_tokens=given.output_tokens,
        repeats=given.repeats,
    )
    run = made(given.work / "timed", config, benchmark, **exported)
    return {
        name: {"ratio": one.ratio, "low": one.low, "high": one.high, "runs": one.pairs}
        for name in STUDENTS
        for one in compare(run, TEACHER, name)
        if one.metric == "itl_ms"
    }


def blocks_of(
    given: argparse.Namespace, recipe: Recipe, model: Artifact, teacher: Artifact, place: Path
) -> list[float]:
    """KL to the teacher in nats per token, by held-out block."""
    config = recipe.evaluate.model_copy(update={"blocks": given.blocks, "tasks": []})
    measured = made(place, config, evaluate, model=model, teacher=teacher)
    content = json.loads((measured.path / "evaluation.json").read_text(encoding="utf-8"))
    blocks: list[float] = content["per_block"]["kl_to_teacher_nats"]
    return blocks


def divergence(found: dict[str, list[float]]) -> dict[str, Any]:
    """Means over blocks, and the difference block by block."""
    differences = [ours - other for ours, other in zip(*map(found.get, STUDENTS), strict=True)]
    low, high = mean_interval(differences)
    means = {name: sum(blocks) / len(blocks) for name, blocks in found.items()}
    mean = means[LATENCY] - means[PARAMS]
    return {
        "kl_to_teacher_nats": means,
        "difference_nats": {"mean": mean, "low": low, "high": high},
    }


def table(record: dict[str, Any]) -> str:
    """Markdown: both students, then the differences."""
    machine = record["hardware"]
    head = (
        f"{machine['processor']}, {machine['cores']} cores; batch {record['batch_size']}, "
        f"{record['input_tokens']} + {record['output_tokens']} tokens; "
        f"{record['distillation_tokens']:,} tokens of distillation"
    )
    lines = [
        head,
        "",
        "| Cut to | Parameters | ITL over the teacher's | KL before (nats) | KL after (nats) |",
        "|:--|--:|--:|--:|--:|",
    ]
    for name in STUDENTS:
        ratio = record["itl_over_teacher"][name]
        kl = [f"{record[moment]['kl_to_teacher_nats'][name]:.4f}" for moment in MOMENTS]
        interval = f"{ratio['ratio']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
        cells = [name, f"{record['parameters_share'][name]:.1%}", interval, *kl]
        lines.append(f"| {' | '.join(cells)} |")
    told = [record[moment]["difference_nats"] for moment in MOMENTS]
    cells = [f"{one['mean']:.4f} ({one['low']:.4f} to {one['high']:.4f})" for one in told]
    lines.append(f"| difference |  |  | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
