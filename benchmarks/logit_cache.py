"""What a cache of top-k log-probabilities takes, loses and costs.

    python benchmarks/logit_cache.py TEACHER [--student CHECKPOINT] [--train-steps 100]

Writes caches of a teacher's checkpoint over real text at several k, a quarter of each drawn. Per k:
bytes per token, all files included; the KL from the dense teacher to the likeliest tokens that the
cache holds, its tail spread evenly over the others; the part of it that is lost by storing and not
by leaving tokens out; forward KL of a student by the dense and by the cached teacher, draws
included; tokens encoded and decoded per second by one thread. Without --student the student is the
teacher with noise on its weights. With --train-steps the student is trained twice, online and
cached, and both are measured on held-out text by the dense teacher. Prints tables, then one line of
JSON.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from showing import shown

from trt_kd.artifacts.environment import environment
from trt_kd.measuring.statistics import half_range, median

LIMITS = {"bytes_per_token_at_50": 100, "loss_after_training_ratio": 1.02}
NOISE = 0.1
"""Of the stand-in student's weights, in standard deviations of each matrix."""
COLUMNS = (
    "| k | Bytes per token | KL to dense (nats) | of it by storing | Loss, dense | Loss, cached "
    "| Encoded tokens/s | Decoded tokens/s |\n|--:|--:|--:|--:|--:|--:|--:|--:|"
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="size, loss and speed of cached log-probabilities")
    parser.add_argument("teacher", type=Path, help="checkpoint with its tokenizer")
    parser.add_argument("--student", type=Path, help="checkpoint with the same tokenizer")
    parser.add_argument("--k", type=int, nargs="+", default=[32, 50, 64, 128])
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--block-tokens", type=int, default=256)
    parser.add_argument("--text", type=Path, help="text file; docstrings without it")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--repeats", type=int, default=5, help="of encoding and decoding")
    parser.add_argument("--train-steps", type=int, default=0)
    parser.add_argument("--train-k", type=int, default=64)
    parser.add_argument("--train-batch", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    given = parser.parse_args(arguments)
    if given.repeats < 2:
        parser.error("--repeats must be 2 at least: a spread needs two runs")
    if given.train_steps and given.student is None:
        parser.error("--train-steps needs --student")
    with tempfile.TemporaryDirectory() as folder:
        return shown(lambda: measured(given, Path(folder)), table)


def measured(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The record."""
    from trt_kd.checkpoints import load_tokenizer
    from trt_kd.data.base import fingerprint, token_blocks
    from trt_kd.teachers.online import OnlineTeacher

    teacher = OnlineTeacher().load(given.teacher, precision=given.precision)
    tokenizer = load_tokenizer(given.teacher)
    blocks = token_blocks(data_of(given), tokenizer, split="train", count=given.blocks)
    student = student_logits(given, blocks)
    rows = [measured_k(given, k, teacher, blocks, student, work / f"k{k}") for k in given.k]
    return {
        "hardware": environment(),
        "workload": {
            "teacher": given.teacher.name,
            "student": given.student.name if given.student else f"teacher with noise {NOISE}",
            "blocks": given.blocks,
            "block_tokens": given.block_tokens,
            "precision": given.precision,
            "vocabulary": teacher.config.vocab_size,
            "data_fingerprint": fingerprint(blocks),
        },
        "repeats": given.repeats,
        "k": rows,
        "training": trained(given, work) if given.train_steps else None,
        "limits": LIMITS,
    }


def data_of(given: argparse.Namespace) -> Any:
    """Settings of the text."""
    from trt_kd.data.base import DataConfig

    source = {"kind": "text", "files": [str(given.text)]} if given.text else "stdlib_docstrings"
    settings = {"source": source, "block_tokens": given.block_tokens}
    return DataConfig.model_validate(settings)


def student_logits(given: argparse.Namespace, blocks: Any) -> list[Any]:
    """Logits ``[L - 1, V]`` in half precision of every block, by the student or its stand-in."""
    import torch

    from trt_kd.checkpoints import load_model

    model = load_model(given.student or given.teacher, dtype="float32")
    if given.student is None:
        torch.manual_seed(0)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight += NOISE * weight.std() * torch.randn_like(weight)
    return [logits.half() for logits in dense_logits(given, model, blocks)]


def dense_logits(given: argparse.Namespace, model: Any, blocks: Any) -> Iterator[Any]:
    """Logits ``[L - 1, V]`` of one block after the other, as training would see them."""
    import torch

    for block in torch.from_numpy(blocks):
        bf16 = given.precision == "bf16"
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits_TV = model(block[None], use_cache=False).logits[0, :-1].float()
        yield logits_TV


def measured_k(
    given: argparse.Namespace, k: int, teacher: Any, blocks: Any, student: list[Any], folder: Path
) -> dict[str, Any]:
    """Bytes, losses and speeds of one cache."""
    from trt_kd.teachers.cached import CachedTeacher
    from trt_kd.teachers.identity import identity_of
    from trt_kd.teachers.writing import write_cache

    identity = identity_of(given.teacher, precision=given.precision)
    contents = CachedTeacher(k=k).contents(identity)
    cache = write_cache(folder, lambda: teacher, blocks, contents=contents)
    size = sum(path.stat().st_size for path in folder.iterdir())
    positions = blocks.shape[0] * (blocks.shape[1] - 1)
    return {
        "k": k,
        "draws": contents.draws,
        "bytes_per_token": size / positions,
        **losses(given, cache, teacher, blocks, student),
        **speeds(given, cache, blocks),
    }


def losses(
    given: argparse.Namespace, cache: Any, teacher: Any, blocks: Any, student: list[Any]
) -> dict[str, float]:
    """Means over positions, in nats: what the cache loses, and what a student is told."""
    import torch
    from torch.nn import functional

    from trt_kd.losses.kl import ForwardKL
    from trt_kd.losses.top_k import top_k_of

    count = cache.index.contents.likeliest
    sums = dict.fromkeys(("kl", "storing_kl", "loss_dense", "loss_cached"), 0.0)
    positions = blocks.shape[0] * (blocks.shape[1] - 1)
    logits = zip(dense_logits(given, teacher, blocks), student, strict=True)
    for number, (dense_TV, student_TV) in enumerate(logits):
        top, true = cache.rows(blocks[number : number + 1]), top_k_of(dense_TV, count)
        others = max(1, dense_TV.shape[1] - count)
        rebuilt_TV = (top.tail - torch.tensor(others).log())[:, None].repeat(1, dense_TV.shape[1])
        rebuilt_TV.scatter_(-1, top.ids, top.logp)
        spread_TV = (true.tail - torch.tensor(others).log())[:, None].repeat(1, dense_TV.shape[1])
        spread_TV.scatter_(-1, true.ids, true.logp)
        dense_logp_TV = dense_TV.log_softmax(-1)
        everything = torch.ones(len(top), dtype=torch.bool)
        exact, kept = (
            functional.kl_div(said, dense_logp_TV, reduction="sum", log_target=True)
            for said in (rebuilt_TV, spread_TV)
        )
        sums["kl"] += float(exact)
        sums["storing_kl"] += float(exact - kept)
        student_TV = student_TV.float()
        sums["loss_dense"] += float(ForwardKL()(student_TV, dense_TV, everything))
        cached, _ = ForwardKL().top_k_value_and_gradient(student_TV, top, everything)
        sums["loss_cached"] += float(cached)
    return {f"{name}_nats_per_token": value / positions for name, value in sums.items()}


def speeds(given: argparse.Namespace, cache: Any, blocks: Any) -> dict[str, float]:
    """Tokens per second of encoding and decoding, each by one thread."""
    from trt_kd.teachers.coding import Kept, encode

    vocabulary = cache.index.contents.identity.vocabulary
    tops = [cache.rows(block[None]) for block in blocks]
    rows = [
        Kept(*(part.numpy() for part in (top.ids, top.logp, top.tail, *top.inside))) for top in tops
    ]
    seconds: dict[str, list[float]] = {"encode": [], "decode": []}
    for _ in range(given.repeats):
        started = time.perf_counter()
        for kept in rows:
            encode(kept, vocabulary)
        seconds["encode"].append(time.perf_counter() - started)
        started = time.perf_counter()
        for start in range(0, len(blocks), 4):
            cache.rows(blocks[start : start + 4])
        seconds["decode"].append(time.perf_counter() - started)
    result: dict[str, float] = {}
    for name, samples in seconds.items():
        result[f"{name}_tokens_per_s"] = blocks.size / median(samples)
        result[f"{name}_spread"] = half_range(samples)
    return result


def trained(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Held-out KL to the dense teacher after equal steps, online and cached."""
    from trt_kd.checkpoints import load_model, load_tokenizer
    from trt_kd.data.base import token_blocks
    from trt_kd.stages.distill import DistillConfig, require_modelopt
    from trt_kd.stages.teaching import train_student
    from trt_kd.teachers.cached import CachedTeacher
    from trt_kd.teachers.online import OnlineTeacher

    require_modelopt()
    tokenizer, data = load_tokenizer(given.teacher), data_of(given)
    heldout = token_blocks(data, tokenizer, split="heldout", count=given.blocks)
    found: dict[str, Any] = {"steps": given.train_steps, "k": given.train_k}
    found["before_nats_per_token"] = heldout_kl(
        given, load_model(given.student, dtype="float32"), heldout
    )
    for name, teacher in (("online", OnlineTeacher()), ("cached", CachedTeacher(k=given.train_k))):
        config = DistillConfig(
            teacher=teacher,
            data=data,
            steps=given.train_steps,
            batch_size=given.train_batch,
            learning_rate=given.learning_rate,
            precision=given.precision,
            checkpoint_every_steps=given.train_steps,
        )
        blocks = token_blocks(data, tokenizer, split="train", count=config.sequences)
        model = load_model(given.student, dtype="float32")
        started = time.perf_counter()
        log = train_student(config, model, blocks, given.teacher, work / name)
        found[name] = {
            "heldout_kl_nats_per_token": heldout_kl(given, model.eval(), heldout),
            "seconds": time.perf_counter() - started,
            "step_s": median([row["seconds"] for row in log.steps]),
        }
    pair = [found[name]["heldout_kl_nats_per_token"] for name in ("cached", "online")]
    return found | {"ratio": pair[0] / pair[1]}


def heldout_kl(given: argparse.Namespace, model: Any, blocks: Any) -> float:
    """Mean forward KL of the model to the dense teacher, in nats per token."""
    import torch

    from trt_kd.losses.kl import ForwardKL
    from trt_kd.teachers.online import OnlineTeacher

    teacher = OnlineTeacher().load(given.teacher, precision=given.precision)
    total, positions = 0.0, 0
    both = (dense_logits(given, one, blocks) for one in (model, teacher))
    for student_TV, teacher_TV in zip(*both, strict=True):
        everything = torch.ones(len(student_TV), dtype=torch.bool)
        total += float(ForwardKL()(student_TV, teacher_TV, everything))
        positions += len(student_TV)
    return total / positions


def table(record: dict[str, Any]) -> str:
    """Markdown."""
    hardware = record["hardware"]
    lines = [f"{hardware['processor']}, {hardware['cores']} cores", "", COLUMNS]
    for row in record["k"]:
        cells = [f"{row['k']}", f"{row['bytes_per_token']:.1f}"]
        names = ("kl", "storing_kl", "loss_dense", "loss_cached")
        cells += [f"{row[f'{name}_nats_per_token']:.5f}" for name in names]
        cells += [f"{row[f'{name}_tokens_per_s']:,.0f}" for name in ("encode", "decode")]
        lines.append(f"| {' | '.join(cells)} |")
    if training := record["training"]:
        lines += ["", "| Teacher | Held-out KL (nats) | Seconds | Seconds per step |"]
        lines += ["|:--|--:|--:|--:|"]
        lines += [f"| untrained | {training['before_nats_per_token']:.4f} | | |"]
        for name in ("online", "cached"):
            one = training[name]
            lines.append(
                f"| {name} | {one['heldout_kl_nats_per_token']:.4f} | {one['seconds']:.1f} "
                f"| {one['step_s']:.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
