"""Every stage as its own command: artifacts in, one artifact out."""

from pathlib import Path
from typing import Annotated

import typer

from trt_kd.cli.console import print_json
from trt_kd.cli.staging import (
    Config,
    Inputs,
    JsonOption,
    Out,
    Settings,
    Source,
    Teacher,
    make,
    roles_of,
    validated,
)
from trt_kd.errors import ConfigError


def import_model(
    settings: Settings = None, *, out: Out, config: Config = None, as_json: JsonOption = False
) -> None:
    """Import a model. Example: trt-kd import source=hf:Qwen/Qwen3-0.6B --out runs/qwen."""
    make("import", settings, config, out, as_json, {})


def score(
    settings: Settings = None,
    *,
    source: Source,
    out: Out,
    config: Config = None,
    as_json: JsonOption = False,
) -> None:
    """Score for searches. Example: trt-kd score --source t --out sc 'axes=[ffn, heads, depth]'."""
    make("score", settings, config, out, as_json, {"source": source})


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
    make("latency", settings, config, out, as_json, {"source": source})


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

        _no_out(out)
        space = validated(SearchSpace, settings, config, "prune")
        list_candidates(space, inputs["source"], table=inputs.get("latency"), as_json=as_json)
        return
    make("prune", settings, config, _out_or_dry(out), as_json, inputs)


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
    out: Annotated[Path | None, typer.Option(help="Folder of the new artifact.")] = None,
    config: Config = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say whether pruning pays and rank; cut nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Prune to the best sizes. Example: trt-kd search --source t --scores sc --out p SETTINGS.

    Settings are those of prune, axes without a size: 'axes=[ffn, heads, depth]' budget.params=80%
    By time: --latency TABLE 'budget.latency={itl_ms: 70%, batch: 4}'
    Does pruning pay at all: the same with --dry-run instead of --out.
    """
    from trt_kd.cli.candidates import ranking
    from trt_kd.stages.corners import PruningDoesNotPayError, told
    from trt_kd.stages.prune import PruneConfig

    inputs = _by_kind(given)
    if dry_run:
        _no_out(out)
        ranking(validated(PruneConfig, settings, config, "prune"), inputs, as_json=as_json)
        return
    try:
        make("prune", settings, config, _out_or_dry(out), as_json, inputs)
    except PruningDoesNotPayError as error:
        if as_json:
            print_json(told(error.corners, error.verdict))
        raise


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
    make("generate", settings, config, out, as_json, {"teacher": teacher})


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
    make("distill", settings, config, out, as_json, inputs)


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
    make("quantize", settings, config, out, as_json, {"source": source})


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
    make("export", given, config, out, as_json, {"source": source})


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
    make("evaluate", settings, config, out, as_json, {"model": model, "teacher": teacher})


def report(
    inputs: Inputs,
    settings: Settings = None,
    *,
    out: Out,
    config: Config = None,
    as_json: JsonOption = False,
) -> None:
    """Write a report. Example: trt-kd report --input teacher.model=t --input benchmark=b."""
    make("report", settings, config, out, as_json, roles_of(inputs))


def _no_out(out: Path | None) -> None:
    if out is not None:
        raise ConfigError("--dry-run writes nothing", hint="leave out --out")


def _out_or_dry(out: Path | None) -> Path:
    if out is None:
        raise ConfigError("where to?", hint="give --out FOLDER, or --dry-run to look first")
    return out


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
