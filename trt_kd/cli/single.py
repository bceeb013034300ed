"""Every stage as its own command: artifacts in, one artifact out."""

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


def import_model(
    settings: Settings = None, *, out: Out, config: Config = None, as_json: JsonOption = False
) -> None:
    """Import a model. Example: trt-kd import source=hf:Qwen/Qwen3-0.6B --out runs/qwen."""
    _run("import", settings, config, out, as_json, {})


def score(
    settings: Settings = None,
    *,
    source: Source,
    out: Out,
    config: Config = None,
    as_json: JsonOption = False,
) -> None:
    """Score for searches. Example: trt-kd score --source t --out sc 'axes=[ffn, heads, depth]'."""
    _run("score", settings, config, out, as_json, {"source": source})


def latency_table(
    settings: Settings = None,
    *,
    source: Source,
    out: Out,
    config: Config = None,
    as_json: JsonOption = False,
) -> None:
    """Time sizes on the runtime. Example: trt-kd latency-table --source t --out l SETTINGS.

    SETTINGS: 'axes=[ffn, depth]' 'lanes={int4: ort-genai}' 'batch_sizes=[1, 4]'
    Then give it as --latency to trt-kd prune or search, with budget.latency.
    """
    _run("latency", settings, config, out, as_json, {"source": source})


def prune(
    settings: Settings = None,
    *,
    given: Annotated[
        list[Path],
        typer.Option(
            "--source",
            "--latency",
            help="Artifact to start from; what trt-kd latency-table wrote of it.",
            show_default=False,
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder of the new artifact.")] = None,
    config: Config = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the sizes that fit the budget; cut nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Prune. Example: trt-kd prune --source t --out p 'axes=[{kind: ffn, size: 1024}]'.

    What fits: trt-kd prune --dry-run --source DIR 'axes=[ffn, depth]' budget.params=80%
    The best of it: trt-kd score, then trt-kd search with the same settings.
    As fast as it has to be: --latency TABLE 'budget.latency={itl_ms: 70%, batch: 4}'
    """
    inputs = _by_kind(given)
    if dry_run:
        from trt_kd.cli.candidates import dry_run as list_candidates
        from trt_kd.pruning.candidates import SearchSpace

        if out is not None:
            raise ConfigError("--dry-run writes nothing", hint="leave out --out")
        space = validated(SearchSpace, settings, config, "prune")
        list_candidates(space, inputs["source"], table=inputs.get("latency"), as_json=as_json)
        return
    if out is None:
        raise ConfigError("where to?", hint="give --out FOLDER, or --dry-run to look first")
    _run("prune", settings, config, out, as_json, inputs)


def search(
    settings: Settings = None,
    *,
    given: Annotated[
        list[Path],
        typer.Option(
            "--source",
            "--scores",
            "--latency",
            help="Artifact to start from; what trt-kd score and latency-table wrote of it.",
            show_default=False,
        ),
    ],
    out: Out,
    config: Config = None,
    as_json: JsonOption = False,
) -> None:
    """Prune to the best sizes. Example: trt-kd search --source t --scores sc --out p SETTINGS.

    Settings are those of prune, axes without a size: 'axes=[ffn, heads, depth]' budget.params=80%
    By time: --latency TABLE 'budget.latency={itl_ms: 70%, batch: 4}'
    """
    _run("prune", settings, config, out, as_json, _by_kind(given))


def generate(
    settings: Settings = None,
    *,
    teacher: Teacher,
    out: Out,
    config: Config = None,
    as_json: JsonOption = False,
) -> None:
    """Write text to distill on. Example: trt-kd generate --teacher t --out g texts=1000.

    Then: trt-kd distill --teacher t --student p --out s SETTINGS, of which one is
    'data.source={kind: generated, artifact: g}'
    """
    _run("generate", settings, config, out, as_json, {"teacher": teacher})


def distill(
    settings: Settings = None,
    *,
    student: Annotated[Path, typer.Option(help="Checkpoint to train.", show_default=False)],
    teacher: Annotated[Path | None, typer.Option(help="Checkpoint of the teacher.")] = None,
    out: Out,
    config: Config = None,
    as_json: JsonOption = False,
) -> None:
    """Distill. Example: trt-kd distill --teacher t --student p --out s steps=60.

    On several GPUs: torchrun --nproc-per-node 8 -m trt_kd.cli distill ... gradient_accumulation=8
    """
    inputs = {"student": student} | ({"teacher": teacher} if teacher else {})
    _run("distill", settings, config, out, as_json, inputs)


def quantize(
    settings: Settings = None,
    *,
    source: Source,
    out: Out,
    config: Config = None,
    as_json: JsonOption = False,
) -> None:
    """Quantize. Example: trt-kd quantize --source s --out q format=fp8.

    With a cache in FP8: trt-kd quantize --source s --out q 'format={kind: fp8, kv_cache: fp8}'
    Then train it: trt-kd quantize --source s --out q format=int4_awq train.steps=200
    """
    _run("quantize", settings, config, out, as_json, {"source": source})


def export(
    settings: Settings = None,
    *,
    source: Source,
    out: Out,
    config: Config = None,
    lane: Annotated[
        str | None, typer.Option(help="Lane without options, or auto.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Export. Example: trt-kd export --source q --out e lane=hf-unified.

    With options: trt-kd export --source s --out e lane.kind=onnx lane.precision=fp16
    For a target: trt-kd export --source q --out e --lane auto target.runtime=trtllm
    For a recipe's target: trt-kd export --source q --out e --lane auto target=recipe.yaml
    """
    given = list(settings or [])
    if lane == "auto":
        given = _with_chosen_lane(given, config, source)
    elif lane is not None:
        given.append(f"lane={lane}")
    _run("export", given, config, out, as_json, {"source": source})


def evaluate(
    settings: Settings = None,
    *,
    model: Annotated[Path, typer.Option(help="Checkpoint or export.", show_default=False)],
    teacher: Teacher,
    out: Out,
    config: Config = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate. Example: trt-kd evaluate --model e --teacher t --out v items=100."""
    _run("evaluate", settings, config, out, as_json, {"model": model, "teacher": teacher})


def report(
    inputs: Inputs,
    settings: Settings = None,
    *,
    out: Out,
    config: Config = None,
    as_json: JsonOption = False,
) -> None:
    """Write a report. Example: trt-kd report --input teacher.model=t --input benchmark=b."""
    _run("report", settings, config, out, as_json, roles_of(inputs))


def _by_kind(folders: list[Path]) -> dict[str, Path]:
    """Roles of a pruning's inputs: scores and latency table by what they say, else the source."""
    from trt_kd.artifacts import Artifact

    roles: dict[str, Path] = {}
    for folder in folders:
        told = (folder / "trt_kd.json").is_file()
        kind = Artifact.open(folder).manifest.kind if told else "checkpoint"
        role = kind if kind in ("scores", "latency") else "source"
        if role in roles:
            raise ConfigError(
                f"{roles[role]} and {folder} are both the {role}", hint="give one of them"
            )
        roles[role] = folder
    if "source" not in roles:
        raise ConfigError("which model?", hint="give its folder as --source")
    return roles


def _with_chosen_lane(settings: list[str], config: Path | None, source: Path) -> list[str]:
    """The settings of an export with a lane in place of the target; the choice is explained."""
    import sys

    from trt_kd.artifacts import Artifact
    from trt_kd.config import apply_overrides, read_yaml, validate
    from trt_kd.exporters.choosing import Deployment, choose

    about = [text for text in settings if text.partition("=")[0].split(".")[0] == "target"]
    rest = [text for text in settings if text not in about]
    named = apply_overrides(read_yaml(config) if config else {}, rest)
    if "lane" in named:
        raise ConfigError("--lane auto chooses the lane", hint="leave out the setting lane")
    whole = [text for text in about if text.startswith("target=")]
    target = apply_overrides({}, whole).get("target", {})
    if isinstance(target, str):
        target = _target_of(Path(target))
    parts = [text for text in about if text not in whole]
    target = apply_overrides({"target": target}, parts)["target"]
    choice = choose(validate(Deployment, target, where="target"), Artifact.open(source))
    for line in choice.explanation():
        print(line, file=sys.stderr)
    return [*rest, f"lane={choice.lane.kind}"]


def _target_of(recipe: Path) -> dict[str, str]:
    """Runtime and GPU that ``prune.target`` of a recipe names."""
    from trt_kd.pipeline.recipe import load_recipe

    target = load_recipe(recipe).prune.target
    named: dict[str, str] = target.model_dump(include={"runtime", "gpu"}, exclude_unset=True)
    if not named:
        raise ConfigError(
            f"prune.target of {recipe} names neither runtime nor gpu",
            hint="say where the model will run: target.runtime=trtllm target.gpu=hopper",
        )
    return named


def roles_of(inputs: list[str]) -> dict[str, Path]:
    """Folders by role."""
    roles = {}
    for text in inputs:
        role, equals, folder = text.partition("=")
        if not equals:
            raise ConfigError(f"--input {text!r} is not ROLE=FOLDER", hint="write role=folder")
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
    from trt_kd.pipeline.run import locked
    from trt_kd.pipeline.stages import STAGES
    from trt_kd.seeding import seed_everything
    from trt_kd.training.distributed import launched, require_one_process

    rank, _ = launched()
    if name != "distill":
        require_one_process(f"trt-kd {name}")
    stage = STAGES[name]
    given = validated(stage.config_class(), settings, config, name)
    artifacts = {role: Artifact.open(path) for role, path in inputs.items()}
    for artifact in artifacts.values():
        artifact.verify()
    seed_everything(getattr(given, "seed", 0))
    with locked(out.absolute().parent) if rank == 0 else nullcontext():
        return stage.run(given, out=out, **artifacts)


def _run(
    name: str,
    settings: list[str] | None,
    config: Path | None,
    out: Path,
    as_json: bool,
    inputs: dict[str, Path],
) -> None:
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
