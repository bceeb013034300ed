"""How well a student drafts for its teacher in speculative decoding."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trt_kd.cli.console import JsonOption, print_json, table
from trt_kd.cli.staging import Config, Out, Settings, run_stage

if TYPE_CHECKING:
    from trt_kd.evaluation.drafting import Drafted


def draft(
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="Settings, such as temperature=0.7.", show_default=False),
    ] = None,
    *,
    teacher: Annotated[Path, typer.Option(help="Checkpoint to draft for.", show_default=False)],
    student: Annotated[Path, typer.Option(help="Checkpoint that drafts.", show_default=False)],
    tokens_ahead: Annotated[
        int, typer.Option(min=1, max=64, help="Most tokens to draft for a step.")
    ] = 8,
    cost_ratio: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Time of a student's pass by a teacher's, as trt-kd benchmark measures it.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a student as a draft. Example: trt-kd draft --teacher runs/t --student runs/s.

    With the speed-up: trt-kd draft --teacher t --student s prompts=32 --cost-ratio 0.2
    On your text: trt-kd draft ... data.source.kind=text 'data.source.files=[a.txt]'
    """
    from trt_kd.artifacts import Artifact
    from trt_kd.config import apply_overrides, validate
    from trt_kd.stages.drafting import DraftConfig, measure_draft

    config = validate(DraftConfig, apply_overrides({}, settings or []), where="draft")
    for path in (teacher, student):
        Artifact.open(path, expect="checkpoint")
    texts = measure_draft(config, teacher=teacher, student=student)
    found: dict[str, dict[str, Any]] = {
        way: _summary(seen, tokens_ahead, cost_ratio) for way, seen in texts.items()
    }
    if as_json:
        settings_used = config.model_dump(mode="json")
        print_json({"schema_version": 1, "settings": settings_used, **found})
    else:
        _print(found, config.prompts)


def pair(
    settings: Settings = None,
    *,
    target: Annotated[Path, typer.Option(help="Its hf-unified export.", show_default=False)],
    draft: Annotated[Path, typer.Option(help="The draft's.", show_default=False)],
    out: Out,
    config: Config = None,
    as_json: JsonOption = False,
) -> None:
    """Put a draft beside its target. Example: trt-kd pair --target t --draft d --out p.

    How far ahead pays, trt-kd draft says: trt-kd pair ... tokens_ahead=3
    """
    made = run_stage("pair", settings, config, out, {"target": target, "draft": draft})
    if as_json:
        print_json(made.manifest.model_dump(mode="json"))
        return
    print(f"pair {made.key[:12]} in {out}\n\n{(out / 'serve.md').read_text(encoding='utf-8')}")


def _summary(texts: "list[Drafted]", ahead: int, cost_ratio: float | None) -> dict[str, Any]:
    """Acceptance, and tokens of a step for every number of drafted tokens."""
    import numpy as np

    from trt_kd.evaluation.drafting import speed_up, tokens_if_alike, tokens_per_step
    from trt_kd.evaluation.fidelity import mean_and_stderr

    mean, error = mean_and_stderr(np.array([text.overlap.mean() for text in texts]))
    rows = []
    for count in range(1, ahead + 1):
        tokens = tokens_per_step(texts, count)
        row = {
            "tokens_ahead": count,
            "tokens_per_step": tokens,
            "tokens_per_step_if_alike": tokens_if_alike(mean, count),
        }
        if cost_ratio is not None:
            row["speed_up"] = speed_up(tokens, count, cost_ratio)
        rows.append(row)
    return {
        "tokens": sum(len(text.accepted) for text in texts),
        "acceptance": mean,
        "acceptance_stderr": error,
        "steps": rows,
    }


def _print(found: dict[str, dict[str, Any]], prompts: int) -> None:
    for way, result in found.items():
        print(
            f"{way}: {result['acceptance']:.3f} ± {result['acceptance_stderr']:.3f} of the drafted "
            f"tokens are accepted, over {result['tokens']} tokens of {prompts} texts\n"
        )
        timed = "speed_up" in result["steps"][0]
        rows = [["drafted ahead", "tokens per step", "if all were alike"] + ["speed-up"] * timed]
        for row in result["steps"]:
            cells = [f"{row[k]:.2f}" for k in list(row)[1:]]
            rows.append([str(row["tokens_ahead"]), *cells])
        print(table(rows))
        if timed:
            best = max(result["steps"], key=lambda row: row["speed_up"])
            print(f"\nbest: {best['tokens_ahead']} ahead, {best['speed_up']:.2f} times as fast")
        print()
