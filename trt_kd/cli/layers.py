"""How similar the layers of a student and its teacher are, and which pairs are worth a loss."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trt_kd.cli.console import JsonOption, print_json, table

if TYPE_CHECKING:
    from trt_kd.training.pairing import Comparison, Judged, Pair


def layers(
    teacher: Annotated[Path, typer.Argument(help="Checkpoint.", show_default=False)],
    student: Annotated[Path, typer.Argument(help="Checkpoint.", show_default=False)],
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="Settings, such as pairs=kept.", show_default=False),
    ] = None,
    *,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens to measure on.")] = 4096,
    figure: Annotated[
        Path | None, typer.Option(help="Draw it into this .svg or .png.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure which layers are alike. Example: trt-kd layers runs/teacher runs/pruned.

    With a picture: trt-kd layers t s pairs=kept --figure cka.svg
    On your text: trt-kd layers t s data.source.kind=text 'data.source.files=[a.txt]'
    """
    from trt_kd.config import apply_overrides, validate
    from trt_kd.reporting.similarity_figure import check_figure, draw_similarity
    from trt_kd.training.pairing import Comparison, judged

    config = validate(Comparison, apply_overrides({}, settings or []), where="layers")
    if figure is not None:
        check_figure(figure)
    similarity, chosen = _measured(teacher, student, config, tokens)
    found = judged(chosen, similarity)
    if as_json:
        print_json(_as_json(similarity, found, tokens))
    else:
        _print(similarity, found)
    if figure is not None:
        draw_similarity(similarity, found, figure)


def _measured(
    teacher: Path, student: Path, config: "Comparison", tokens: int
) -> "tuple[list[list[float]], list[Pair]]":
    """The matrix, a row for every layer of the student, and the pairs."""
    from trt_kd.architectures.shape import read_shape
    from trt_kd.artifacts import Artifact
    from trt_kd.checkpoints import load_model, load_tokenizer
    from trt_kd.data.base import token_blocks
    from trt_kd.stages.matching import check_pair
    from trt_kd.training.pairing import most_similar, paired

    opened = {n: Artifact.open(p, expect="checkpoint") for n, p in (("t", teacher), ("s", student))}
    check_pair(student=student, teacher=teacher)
    depths = read_shape(student).layers, read_shape(teacher).layers
    kept: Any = opened["s"].metrics.get("kept_layers")
    given = None if config.pairs == "cka" else paired(config, depths, kept)
    count = -(-tokens // config.data.block_tokens)
    blocks = token_blocks(config.data, load_tokenizer(student), split="train", count=count)
    from trt_kd.training.similarity import layer_similarity

    small, large = (load_model(path, dtype="float32") for path in (student, teacher))
    similarity = layer_similarity(small, large, blocks).tolist()
    return similarity, most_similar(config, similarity) if given is None else given


def _print(similarity: list[list[float]], pairs: "list[Judged]") -> None:
    columns = range(len(similarity[0]))
    print(
        "linear CKA in hundredths: a row for each layer of the student, a column of the teacher\n"
    )
    print("    " + "".join(f"{column:4}" for column in columns))
    for number, row in enumerate(similarity):
        print(f"{number:4}" + "".join(f"{100 * value:4.0f}" for value in row))
    rows = [["student", "teacher", "CKA", "best teacher", "its CKA"]]
    rows += [
        [str(p.student), str(p.teacher), f"{p.cka:.2f}", str(p.best_teacher), f"{p.best_cka:.2f}"]
        for p in pairs
    ]
    print("\n" + table(rows))
    for pair in pairs:
        if pair.weak:
            print(
                f"\nwarning: weak_pair: [{pair.student}, {pair.teacher}] has a CKA of "
                f"{pair.cka:.2f}, under 0.9 of the best in its row\n"
                f"  hint: pair layer {pair.student} with {pair.best_teacher}, or set pairs: cka"
            )


def _as_json(
    similarity: list[list[float]], pairs: "list[Judged]", tokens: int
) -> dict[str, object]:
    return {
        "schema_version": 1,
        "tokens": tokens,
        "cka": similarity,
        "pairs": [{**vars(pair), "warnings": ["weak_pair"] if pair.weak else []} for pair in pairs],
    }
