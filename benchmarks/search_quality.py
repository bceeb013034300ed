"""How good the searched sizes are: one shot, no training, perplexity divided by the teacher's.

    python benchmarks/search_quality.py [--teacher CHECKPOINT] [--shares 0.803 0.70]

Scores the teacher once, searches ffn, heads, kv_heads and depth under every share of the
parameters, and cuts every single axis that can reach the share, hidden among them, also where that
is beyond the search's own limits. Perplexity is that
of held-out docstrings of Python's standard library; no calibration text is among them. Without
--teacher the quickstart's is imported. What is finished in the work folder is not made again.
Under the first share the candidates also meet in a tournament: its winner is what is measured.
Prints a table, then one line of JSON.
"""

import argparse
import math
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from showing import shown

from trt_kd.architectures.shape import ModelShape, read_shape
from trt_kd.artifacts import Artifact, work_key
from trt_kd.artifacts.environment import environment
from trt_kd.config import StageConfig
from trt_kd.errors import ArtifactError, ModelError
from trt_kd.pipeline.recipe import load_recipe
from trt_kd.pruning import AXES as AXIS_TABLE
from trt_kd.pruning.reconstruction import Reconstruct
from trt_kd.pruning.search import Search
from trt_kd.pruning.sizes import settled
from trt_kd.stages.import_model import import_model
from trt_kd.stages.prune import PruneConfig, prune
from trt_kd.stages.score import score, scoring_of

RECIPE = Path(__file__).parents[1] / "workflows" / "quickstart.yaml"
AXES: list[Any] = ["ffn", "heads", "kv_heads", {"kind": "depth", "contiguous": True}]
ONCE = {"hidden"}
"""Axes that a refit layer after layer does not go with."""
LIMITS = {"0.803": 1.25, "0.70": 1.50}
BATCH = 4


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="quality of searched sizes, without training")
    parser.add_argument("--teacher", type=Path, help="checkpoint artifact; else the quickstart's")
    parser.add_argument("--work", type=Path, default=Path("runs/search-quality"))
    parser.add_argument("--shares", nargs="+", default=list(LIMITS), help="of the parameters")
    parser.add_argument("--calibration-tokens", type=int, default=24_576)
    parser.add_argument("--heldout-blocks", type=int, default=48)
    parser.add_argument("--top-k", type=int, default=3)
    parser.add_argument("--tournament-steps", type=int, default=20)
    given = parser.parse_args(arguments)
    return shown(lambda: compare(given), table)


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """Search, cut, measure."""
    teacher = teacher_of(given)
    search = {"top_k": given.top_k, "max_width_pruning": 0.5, "max_depth_pruning": 0.34}
    common = {
        "reconstruct": {"schedule": "sequential"},
        "calibration_tokens": given.calibration_tokens,
    }
    tournament = {"contestants": max(2, given.top_k), "steps": given.tournament_steps}
    configs = {
        share: PruneConfig.model_validate(
            {
                **common,
                "axes": AXES,
                "budget": {"params": float(share)},
                "search": search | ({} if number else {"tournament": tournament}),
            }
        )
        for number, share in enumerate(given.shares)
    }
    scoring = scoring_of(next(iter(configs.values())))
    scores = made(given.work / "scores", scoring, score, source=teacher)
    base = perplexity(teacher, given.heldout_blocks)
    result: dict[str, Any] = {
        "hardware": environment(),
        "teacher_perplexity": base,
        "heldout_tokens": given.heldout_blocks * configs[given.shares[0]].data.block_tokens,
        "calibration_tokens": given.calibration_tokens,
        "limits": LIMITS,
        "sensitivity": scores.metrics["sensitivity"],
        "ratio_at": {},
        "single_axis": {},
        "without_reconstruction": {},
        "cuts": {},
    }

    def measured(
        name: str, config: PruneConfig, *, known: bool = True, beyond_limits: bool = False
    ) -> float:
        inputs = {"scores": scores} if known else {}
        pruned = made(given.work / name, config, prune, source=teacher, **inputs)
        ratio = perplexity(pruned, given.heldout_blocks) / base
        result["cuts"][name] = {
            "ratio": ratio,
            "parameters_share": pruned.metrics["parameters_share"],
            "sizes": pruned.metrics["kept_sizes"],
            "search": pruned.metrics.get("search"),
            "beyond_limits": beyond_limits,
        }
        return ratio

    shape = read_shape(teacher.path)
    for share, config in configs.items():
        found = result["ratio_at"][share] = measured(f"searched-{share}", config)
        searched = read_shape(given.work / f"searched-{share}")
        result["single_axis"][share] = {
            # What was searched may be a single axis: then it is the same cut.
            kind: found
            if alone.planned(shape) == searched
            else measured(
                f"{kind}-{share}",
                alone,
                known=kind not in ONCE,
                beyond_limits=beyond_limits(alone, config, shape),
            )
            for kind, alone in single_axes(config, shape).items()
        }
        plain = plain_cut(config, searched)
        result["without_reconstruction"][share] = measured(f"plain-{share}", plain)
    return result


def teacher_of(given: argparse.Namespace) -> Artifact:
    """The checkpoint given, or the quickstart's own."""
    if given.teacher:
        return Artifact.open(given.teacher, expect="checkpoint")
    return made(given.work / "teacher", load_recipe(RECIPE).import_, import_model)


def made(
    out: Path, config: StageConfig, stage: Callable[..., Artifact], **inputs: Artifact
) -> Artifact:
    """The artifact of a stage, from disk if it stands there."""
    key = work_key(config, {role: artifact.key for role, artifact in inputs.items()})
    try:
        found = Artifact.open(out)
    except ArtifactError:
        found = None
    if found is not None and found.key == key:
        return found
    if out.exists():
        shutil.rmtree(out)
    started = time.perf_counter()
    artifact = stage(config, out=out, **inputs)
    print(f"{out.name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return artifact


def single_axes(config: PruneConfig, shape: ModelShape) -> dict[str, PruneConfig]:
    """One axis open alone, where it can reach the budget; hidden besides those of ``config``."""
    # Llama's config wants whole heads in the hidden size, and no tile divides that of every model.
    hidden = AXIS_TABLE.load("hidden")(multiple_of=shape.heads)
    found = {}
    for axis in (*config.axes, hidden):
        changes: dict[str, Any] = {"axes": [axis], "search": None}
        if axis.kind in ONCE:
            changes["reconstruct"] = Reconstruct()
        alone = config.model_copy(update=changes)
        with suppress(ModelError):
            alone.planned(shape)
            found[axis.kind] = alone
    return found


def beyond_limits(alone: PruneConfig, config: PruneConfig, shape: ModelShape) -> bool:
    """Whether more of the only axis of ``alone`` goes than the search of ``config`` may take."""
    limits, (axis,) = config.searching or Search(), alone.axes
    limit = limits.max_depth_pruning if axis.unit == "layers" else limits.max_width_pruning
    return 1.0 - axis.read(alone.planned(shape)) / axis.read(shape) > limit


def plain_cut(config: PruneConfig, searched: ModelShape) -> PruneConfig:
    """The searched sizes without a refit."""
    return config.model_copy(
        update={
            "axes": settled(config.axes, searched),
            "budget": None,
            "search": None,
            "reconstruct": None,
        }
    )


def perplexity(model: Artifact, blocks: int) -> float:
    """Of held-out text, every token but the first of a block predicted."""
    import torch
    from torch.nn.functional import cross_entropy

    from trt_kd.checkpoints import load_model, load_tokenizer
    from trt_kd.data.base import DataConfig, token_blocks

    tokenizer = load_tokenizer(model.path)
    text = torch.from_numpy(token_blocks(DataConfig(), tokenizer, split="heldout", count=blocks))
    loaded = load_model(model.path, dtype="float32")
    nats, count = 0.0, 0
    with torch.no_grad():
        for tokens_BL in text.split(BATCH):
            logits_BLV = loaded(input_ids=tokens_BL, use_cache=False).logits[:, :-1]
            labels_T = tokens_BL[:, 1:].flatten()
            nats += float(cross_entropy(logits_BLV.flatten(0, 1), labels_T, reduction="sum"))
            count += labels_T.numel()
    return math.exp(nats / count)


def table(result: dict[str, Any]) -> str:
    """Markdown: every cut with its share, sizes and perplexity over the teacher's."""
    hardware = result["hardware"]
    lines = [
        f"{hardware['processor']}, {hardware['cores']} cores.",
        "",
        f"Teacher: {result['teacher_perplexity']:.2f} on {result['heldout_tokens']:,} tokens.",
        "",
        "| Cut | Parameters | Sizes | Perplexity over the teacher's | Limit |",
        "|:--|--:|:--|--:|--:|",
    ]
    for name, cut in result["cuts"].items():
        share = name.removeprefix("searched-")
        limit = f"{LIMITS[share]:.2f}" if share in LIMITS else ""
        sizes = ", ".join(f"{key} {value:,}" for key, value in cut["sizes"].items())
        lines.append(
            f"| {name} | {cut['parameters_share']:.1%} | {sizes} | {cut['ratio']:.3f} | {limit} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
