"""What every loss makes of the same student with the same tokens.

    python benchmarks/losses_table.py [--teacher CHECKPOINT --student CHECKPOINT] [--steps 30]

Trains the quickstart's pruned student by the quickstart's settings, once with every loss against
the teacher's logits at its defaults, once with each of the main feature losses beside the forward
KL, at weight 1 and in the pairs of the default, and once on plain cross-entropy. Measures each on
held-out text and on the quickstart's tasks. What is finished in the work folder is not made again.
Without --teacher and --student the quickstart's are made. Prints a table, then one line of JSON.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from search_quality import made, teacher_of
from showing import shown

from trt_kd.artifacts import Artifact
from trt_kd.artifacts.environment import environment
from trt_kd.losses import LOSSES
from trt_kd.pipeline.recipe import load_recipe
from trt_kd.stages.distill import DistillConfig, distill
from trt_kd.stages.evaluate import evaluate
from trt_kd.stages.prune import prune

RECIPE = Path(__file__).parents[1] / "workflows" / "quickstart.yaml"
UNTRAINED, CROSS_ENTROPY = "untrained", "cross_entropy"
FEATURES: dict[str, dict[str, Any]] = {
    "mse": {"normalise": "standardise"},
    "cosine": {},
    "attention_transfer": {},
    "gram": {},
    "rkd_distance": {},
    "minilm": {"count": 1},
}
"""The main ones, with what makes them fit here: one pair, the last, is enough for relations."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="every loss on the same student and tokens")
    parser.add_argument("--teacher", type=Path, help="checkpoint artifact; else the quickstart's")
    parser.add_argument("--student", type=Path, help="checkpoint artifact; else the quickstart's")
    parser.add_argument("--work", type=Path, default=Path("runs/losses-table"))
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="for all other settings")
    parser.add_argument("--losses", nargs="+", default=LOSSES.names(), choices=LOSSES.names())
    parser.add_argument(
        "--features",
        nargs="*",
        default=list(FEATURES),
        choices=list(FEATURES),
        help="beside the KL",
    )
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args(arguments)
    return shown(lambda: compared(given), table)


def compared(given: argparse.Namespace) -> dict[str, Any]:
    """Train and measure."""
    recipe = load_recipe(given.recipe)
    teacher = teacher_of(given)
    student = (
        Artifact.open(given.student, expect="checkpoint")
        if given.student
        else made(given.work / "pruned", recipe.prune, prune, source=teacher)
    )
    steps = {
        "steps": given.steps,
        "warmup_steps": min(recipe.distill.warmup_steps, given.steps - 1),
    }
    base = recipe.distill.model_copy(update=steps)
    control = made(given.work / CROSS_ENTROPY, base.cross_entropy(), distill, student=student)
    trained = {UNTRAINED: student, CROSS_ENTROPY: control}
    objectives: dict[str, dict[str, Any]] = {name: {"loss": name} for name in given.losses}
    for kind in given.features:
        term = {"loss": kind} | FEATURES[kind]
        objectives[f"forward_kl+{kind}"] = {"loss": "forward_kl", "features": [term]}
    for name, objective in objectives.items():
        config = DistillConfig.model_validate(base.model_dump() | objective)
        out = given.work / name
        trained[name] = made(out, config, distill, student=student, teacher=teacher)
    rows = {}
    for name, model in trained.items():
        out = given.work / f"evaluate-{name}"
        measured = made(out, recipe.evaluate, evaluate, model=model, teacher=teacher)
        rows[name] = measured.metrics | {"seconds": model.metrics["seconds"]}
    rows[UNTRAINED].pop("seconds")
    return {
        "hardware": environment(),
        "steps": given.steps,
        "tokens": base.tokens,
        "learning_rate": base.learning_rate,
        "parameters_share": student.metrics.get("parameters_share"),
        "results": [{"name": name} | row for name, row in rows.items()],
    }


def table(record: dict[str, Any]) -> str:
    """Markdown, the nearest to the teacher first."""
    hardware = record["hardware"]
    tasks = list(record["results"][0]["tasks"])
    heads = ["Loss", "Held-out KL (nats)", "Agreement", "Cross-entropy (nats)", *tasks, "Seconds"]
    lines = [
        f"{hardware['processor']}, {hardware['cores']} cores; {record['tokens']:,} tokens each.",
        "",
        f"| {' | '.join(heads)} |",
        f"|:--|{'--:|' * (len(heads) - 1)}",
    ]
    for row in sorted(record["results"], key=lambda row: row["kl_to_teacher_nats"]):
        cells = [
            row["name"],
            f"{row['kl_to_teacher_nats']:.4f} ± {row['kl_to_teacher_nats_stderr']:.4f}",
            f"{row['top1_agreement']:.3f}",
            f"{row['loss_nats_per_token']:.3f}",
            *(f"{row['tasks'][task]['accuracy']:.2f}" for task in tasks),
            f"{row['seconds']:.0f}" if "seconds" in row else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
