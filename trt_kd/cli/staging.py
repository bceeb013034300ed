"""What the commands of single stages share: their options, and from settings to an artifact."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from trt_kd.cli.console import print_json
from trt_kd.errors import ConfigError

if TYPE_CHECKING:
    from trt_kd.artifacts import Artifact
    from trt_kd.config import StrictModel

M = TypeVar("M", bound="StrictModel")
Settings = Annotated[
    list[str] | None,
    typer.Argument(help="Settings, such as steps=20.", show_default=False),
]
Config = Annotated[
    Path | None, typer.Option(help="YAML file with the stage's settings.", show_default=False)
]
Out = Annotated[Path, typer.Option(help="Folder of the new artifact.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")]
Source = Annotated[Path, typer.Option(help="Artifact to start from.", show_default=False)]
Teacher = Annotated[Path, typer.Option(help="Checkpoint of the teacher.", show_default=False)]
Inputs = Annotated[
    list[str],
    typer.Option("--input", help="ROLE=FOLDER, once for each artifact.", show_default=False),
]

_NO_ROLES = ("config", "out", "self")


def roles_of(inputs: list[str]) -> dict[str, Path]:
    """Folders by role."""
    roles: dict[str, Path] = {}
    for text in inputs:
        role, _, folder = text.partition("=")
        if not role or not folder:
            raise ConfigError(f"--input {text!r} is not ROLE=FOLDER", hint="write role=folder")
        if role in roles or role in _NO_ROLES:
            why = "given twice" if role in roles else "no role"
            raise ConfigError(f"--input {role} is {why}", hint="choose another name for it")
        roles[role] = Path(folder)
    return roles


def validated(model: type[M], settings: list[str] | None, config: Path | None, name: str) -> M:
    """Settings from a file and the command line."""
    from trt_kd.config import apply_overrides, read_yaml, validate

    given = apply_overrides(read_yaml(config) if config else {}, settings or [])
    return validate(model, given, where=str(config or name))


def run_stage(
    name: str,
    settings: list[str] | None,
    config: Path | None,
    out: Path,
    inputs: dict[str, Path],
) -> "Artifact":
    """Run one stage; where several processes train, every one of them gets the result."""
    from trt_kd.artifacts import Artifact
    from trt_kd.pipeline.run import locked, perform
    from trt_kd.pipeline.stages import STAGES
    from trt_kd.training.distributed import launched, require_one_process

    rank, _ = launched()
    if name != "distill":
        require_one_process(f"trt-kd {name}")
    given = validated(STAGES[name].config_class(), settings, config, name)
    artifacts = {role: Artifact.open(path) for role, path in inputs.items()}
    with locked(out.absolute().parent) if rank == 0 else nullcontext():
        return perform(name, given, out, artifacts, set())


def make(
    name: str,
    settings: list[str] | None,
    config: Path | None,
    out: Path,
    as_json: bool,
    inputs: dict[str, Path],
) -> None:
    """Run one stage and say what it made."""
    from trt_kd.training.distributed import launched

    made = run_stage(name, settings, config, out, inputs)
    rank, _ = launched()
    if rank:
        return
    if as_json:
        print_json(made.manifest.model_dump(mode="json"))
        return
    print(f"{made.manifest.kind} {made.key[:12]} in {out}")
    for metric, value in made.metrics.items():
        if isinstance(value, int | float | str):
            print(f"  {metric}: {value}")
