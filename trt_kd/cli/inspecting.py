"""Commands that only look: show an artifact, list the families, examine the machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trt_kd.cli.console import JsonOption, print_json, table

if TYPE_CHECKING:
    from trt_kd.artifacts import Artifact


def show(
    artifact: Annotated[Path, typer.Argument(help="Folder of an artifact.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Show an artifact and what it descends from; every file's digest is checked first.

    Example: trt-kd show runs/quickstart/student
    """
    from trt_kd.artifacts import Artifact

    opened = Artifact.open(artifact)
    opened.verify()
    if as_json:
        print_json(opened.manifest.model_dump(mode="json"))
    else:
        _print_artifact(opened)


def ls(as_json: JsonOption = False) -> None:
    """List the members of every family, with a line each."""
    from trt_kd.pipeline.families import FAMILIES
    from trt_kd.pipeline.stages import STAGES

    members = {family.what: {n: family.summary(n) for n in family.names()} for family in FAMILIES}
    members["stage"] = {name: stage.summary for name, stage in STAGES.items()}
    if as_json:
        print_json(members)
        return
    for what, named in members.items():
        print(what)
        width = max(len(name) for name in named)
        for name, summary in named.items():
            print(f"  {name:<{width}}  {summary}")


def doctor(
    as_json: JsonOption = False,
    deep: Annotated[bool, typer.Option(help="Also import the heavy packages, each apart.")] = False,
) -> None:
    """Say what this machine can do and how to get the rest."""
    from trt_kd.doctor import capabilities, checks, render, render_capabilities, to_json

    found = checks(deep=deep)
    if as_json:
        print_json(to_json(found))
    else:
        print(render(found))
        print()
        print(render_capabilities(capabilities()))
    if any(check.status == "fail" for check in found):
        raise typer.Exit(1)


def _print_artifact(opened: "Artifact") -> None:
    manifest = opened.manifest
    print(f"{manifest.kind} by {manifest.stage}, key {manifest.key[:12]}, {manifest.created}")
    print(f"{len(manifest.files)} files, {opened.size_bytes:,} bytes, all digests match\n")
    rows = [["metric", "value"]]
    for name, value in manifest.metrics.items():
        if isinstance(value, dict | list):
            rows.append([name, f"({len(value)} entries, see --json)"])
        else:
            rows.append([name, f"{value:,}" if isinstance(value, int) else str(value)])
    if len(rows) > 1:
        print(table(rows) + "\n")
    print("lineage")
    _print_ancestors(opened, dict(manifest.inputs), depth=1)


def _print_ancestors(opened: "Artifact", inputs: dict[str, str], *, depth: int) -> None:
    for role, key in inputs.items():
        ancestor = opened.manifest.lineage.get(key)
        stage = ancestor.stage if ancestor else "?"
        print(f"{'  ' * depth}{role}: {stage} {key[:12]}")
        if ancestor:
            _print_ancestors(opened, ancestor.inputs, depth=depth + 1)
