"""Measure what a model does: its distance from the teacher and its accuracy on tasks.

It runs on a checkpoint and on an export alike, through the runtime that will serve it.
"""

import json
from difflib import get_close_matches
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from pydantic import AfterValidator, PositiveInt
from typing_extensions import Self

from trt_kd.artifacts import Artifact, writing
from trt_kd.backends.base import Session, backend_for
from trt_kd.checkpoints import load_tokenizer
from trt_kd.config import StageConfig
from trt_kd.data.base import DataConfig, fingerprint, token_blocks
from trt_kd.errors import ArtifactError, VerificationError
from trt_kd.evaluation import TASKS
from trt_kd.evaluation.vocabulary import check_padding, check_same_tokenizer, context_tokens
from trt_kd.heap import kept_pages
from trt_kd.measuring.progress import progress
from trt_kd.optional import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trt_kd.evaluation.fidelity import BlockScores
    from trt_kd.evaluation.harness import TaskResult


def _no_near_miss(names: list[str]) -> list[str]:
    """Refuse a name that is almost one of ours: it would be looked up at the hub."""
    for name in names:
        close = get_close_matches(name, TASKS.names(), n=1, cutoff=0.8)
        if name not in TASKS.names() and close:
            raise ValueError(f"unknown task {name!r}; did you mean {close[0]!r}?")
    if len(set(names)) < len(names):
        raise ValueError("a task stands twice")
    return names


class EvaluateConfig(StageConfig):
    """On how much text and on which tasks to measure."""

    stage: ClassVar[str] = "evaluate"

    data: DataConfig = DataConfig()
    """Text; only its held-out split is read."""
    blocks: PositiveInt = 32
    """Held-out blocks behind KL, agreement and perplexity."""
    tasks: Annotated[list[str], AfterValidator(_no_near_miss)] = [
        "docstring_continuation",
        "facts",
    ]
    """Our tasks, which need no network, and any of lm-evaluation-harness by name."""
    items: PositiveInt = 100
    """Items per task, or all it has if that is less."""
    batch_size: PositiveInt = 16
    """Choices per forward pass; blocks, which are longer, pass a quarter as many at a time."""
    seed: int = 0
    """Order of held-out documents, and which of them become items."""

    def outside(self) -> dict[str, str]:
        """Fingerprint of the text."""
        return self.data.outside()

    def rehearsal(self) -> Self:
        """Two blocks, and four items of each task."""
        return self.model_copy(update={"blocks": 2, "items": 4})


def evaluate(config: EvaluateConfig, *, model: Artifact, teacher: Artifact, out: Path) -> Artifact:
    """Measure ``model``, a checkpoint or an export, beside the checkpoint ``teacher``.

    Writes ``evaluation.json`` (all results, per-block values) and ``items.jsonl`` (one line per
    task item).

    Raises:
        ArtifactError: if ``teacher`` is no checkpoint or no backend runs ``model``.
        DataError: if there is too little held-out text.
        ModelError: if the two have different tokenizers or vocabularies.
        VerificationError: if logits are not finite.
    """
    if teacher.manifest.kind != "checkpoint":
        raise ArtifactError(
            f"the teacher {teacher.path} holds a {teacher.manifest.kind}, not a checkpoint",
            hint="give the imported or corrected teacher",
        )
    require("torch", extra="compress")
    require("lm_eval", extra="eval")
    check_same_tokenizer(model.path, teacher.path)
    tokenizer = load_tokenizer(teacher.path)
    blocks = token_blocks(
        config.data, tokenizer, split="heldout", count=config.blocks, seed=config.seed
    )
    inputs = {"model": model, "teacher": teacher}
    backend = backend_for(model)
    with (
        writing(out, kind="evaluation", config=config, inputs=inputs) as draft,
        kept_pages(),
        backend.load(model.path) as session,
    ):
        scores = _compare(session, model, teacher, blocks, max(1, config.batch_size // 4))
        results = _run_tasks(config, session, tokenizer, max_tokens=context_tokens(teacher.path))
        draft.metrics.update(_fidelity_metrics(scores, blocks))
        draft.metrics["tasks"] = {result.name: result.summary() for result in results}
        record = {
            "schema_version": 1,
            **draft.metrics,
            "backend": backend.kind,
            "model": model.key,
            "teacher": teacher.key,
            "heldout_blocks_sha256": fingerprint(blocks),
            "per_block": {
                "kl_to_teacher_nats": scores.kl_nats.tolist(),
                "top1_agreement": scores.top1_agreement.tolist(),
                "loss_nats_per_token": scores.loss_nats.tolist(),
            },
        }
        _write(draft.path, record, results)
    return Artifact.open(out, expect="evaluation")


def _compare(
    session: Session, model: Artifact, teacher: Artifact, blocks: np.ndarray, batch: int
) -> "BlockScores":
    """Score held-out blocks; a model that is its own teacher runs once.

    Where one vocabulary is longer, by padding, both are scored on the tokens that both have.
    """
    from trt_kd.evaluation.fidelity import block_scores, joined

    def scores_beside(other: Session | None) -> "BlockScores":
        parts = []
        starts = range(0, len(blocks), batch)
        for start in progress(starts, "held-out text"):
            tokens_BL = blocks[start : start + batch]
            model_BLV = _finite(session.logits(tokens_BL), model, start)
            teacher_BLV = (
                model_BLV if other is None else _finite(other.logits(tokens_BL), teacher, start)
            )
            shared = min(model_BLV.shape[-1], teacher_BLV.shape[-1])  # the rest is padding
            pair = model_BLV[..., :shared], teacher_BLV[..., :shared]
            parts.append(block_scores(*pair, tokens_BL))
        return joined(parts)

    if model.key == teacher.key:
        return scores_beside(None)
    with backend_for(teacher).load(teacher.path) as other:
        sizes = {"student": session.vocab_size, "teacher": other.vocab_size}
        check_padding(**sizes, tokenizer=teacher.path)
        return scores_beside(other)


def _finite(logits_BLV: np.ndarray, artifact: Artifact, first_block: int) -> np.ndarray:
    if not np.isfinite(logits_BLV).all():
        raise VerificationError(
            f"{artifact.path}: logits are not finite, in or soon after held-out block "
            f"{first_block}",
            hint="its weights are damaged or its number format overflows: make it again",
        )
    return logits_BLV


def _run_tasks(
    config: EvaluateConfig,
    session: Session,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_tokens: int,
) -> "list[TaskResult]":
    from trt_kd.evaluation.harness import run_items, run_named
    from trt_kd.evaluation.session_lm import SessionLM

    lm = SessionLM(session, tokenizer, batch_size=config.batch_size, max_tokens=max_tokens)
    results = []
    for name in config.tasks:
        if name in TASKS.names():
            task = TASKS.load(name).model_validate({"kind": name})
            items = task.items(config.data, limit=config.items, seed=config.seed)
            results.append(run_items(lm, name, items))
        else:
            results.append(run_named(lm, name, limit=config.items, seed=config.seed))
    return results


def _fidelity_metrics(scores: "BlockScores", blocks: np.ndarray) -> dict[str, Any]:
    from trt_kd.evaluation.fidelity import mean_and_stderr

    metrics: dict[str, Any] = {}
    for name, values in (
        ("kl_to_teacher_nats", scores.kl_nats),
        ("top1_agreement", scores.top1_agreement),
        ("loss_nats_per_token", scores.loss_nats),
    ):
        metrics[name], metrics[f"{name}_stderr"] = mean_and_stderr(values)
    metrics["perplexity"] = exp(metrics["loss_nats_per_token"])
    metrics["heldout_tokens"] = len(blocks) * (blocks.shape[1] - 1)
    return metrics


def _write(folder: Path, record: dict[str, Any], results: "list[TaskResult]") -> None:
    text = json.dumps(record, indent=2, allow_nan=False)
    (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    lines = [
        json.dumps({"task": result.name, "item": item, "correct": correct == 1.0})
        for result in results
        for item, correct in enumerate(result.correct)
    ]
    (folder / "items.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
