"""Short distillation of the best candidates, on one cache of the teacher's logits.

Minitron (arXiv:2407.14679) ranks candidates after a short retraining, since the order of the
untrained ones changes with it. Contestants that stay go on from where the round before left them.
"""

import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trt_kd.artifacts import piece
from trt_kd.checkpoints import load_model, save_model, stored_dtype
from trt_kd.pruning.halving import Tournament, compared, leader_share, order, rank_agreement
from trt_kd.stages.choosing import Divergences, Trial
from trt_kd.stages.distill import DistillConfig
from trt_kd.stages.teaching import train_student
from trt_kd.teachers.cached import CachedTeacher
from trt_kd.teachers.identity import identity_of
from trt_kd.teachers.online import OnlineTeacher
from trt_kd.teachers.writing import write_cache

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trt_kd.teachers.cache import Cache


def hold(
    trial: Trial, tournament: Tournament, measured: Divergences, *, first: str
) -> dict[str, Any]:
    """Let the best of ``measured`` train in rounds; return the record, with the winner's name.

    ``first`` is the prediction's first choice, which takes part in any case.
    """
    standing = contestants(measured, tournament.contestants, first=first)
    blocks = trial.text(tournament.sequences(), offset=trial.check_blocks)
    cache = _cache(trial, tournament, blocks)
    results = [{name: measured[name] for name in standing}]
    folder, tokens = trial.work / "candidates", 0
    for number, (steps, part) in enumerate(_parts(tournament, len(standing), blocks), start=1):
        target = trial.work / f"round-{number}"
        train = partial(_train, trial, _schedule(trial, tournament, steps), part, cache)
        results.append({name: train(folder / name, target / name) for name in standing})
        standing = order(results[-1])[: max(2, -(-len(standing) // 2))]
        folder, tokens = target, tokens + part.size
    winner = standing[0]
    return {
        "rounds": list(_history(results)),
        "tokens_of_the_winner": tokens,
        "first_choice": first,
        "winner": winner,
        "against_first_choice": _against(results[1:], winner, first),
    }


def contestants(measured: Divergences, count: int, *, first: str) -> list[str]:
    """The ``count`` best measured ones, the prediction's first choice among them."""
    best = order(measured)[:count]
    return best if first in best else [*best[:-1], first]


def _cache(trial: Trial, tournament: Tournament, blocks: "NDArray[np.int64]") -> "Cache":
    precision, teacher = DistillConfig().precision, CachedTeacher(k=tournament.top_k)
    identity = identity_of(trial.source, precision=precision)
    return write_cache(
        trial.work / "logits",
        partial(OnlineTeacher().load, trial.source, precision=precision),
        blocks,
        contents=teacher.contents(identity),
        batch_size=tournament.batch_size,
    )


def _parts(
    tournament: Tournament, count: int, blocks: "NDArray[np.int64]"
) -> "Iterator[tuple[int, NDArray[np.int64]]]":
    """Steps and text of every round; no text is read twice."""
    start = 0
    for _, steps in tournament.rounds(count):
        end = start + steps * tournament.batch_size
        yield steps, blocks[start:end]
        start = end


def _schedule(trial: Trial, tournament: Tournament, steps: int) -> DistillConfig:
    return DistillConfig(
        steps=steps,
        batch_size=tournament.batch_size,
        learning_rate=tournament.learning_rate,
        warmup_steps=steps // 5,
        checkpoint_every_steps=steps,
        monitor=None,
        teacher=CachedTeacher(k=tournament.top_k),
        data=trial.config.data,
        seed=trial.config.seed,
    )


def _train(
    trial: Trial,
    config: DistillConfig,
    blocks: "NDArray[np.int64]",
    cache: "Cache",
    start: Path,
    target: Path,
) -> "NDArray[np.float64]":
    """Train the checkpoint ``start`` into ``target``, unless that is done; return divergences."""
    import torch

    def make(folder: Path) -> dict[str, Any]:
        model, work = load_model(start, dtype="float32"), target.with_name(f"{target.name}.work")
        train_student(config, model, blocks, cache, work)
        divergence_B = trial.reference.divergence(model)
        model.to(getattr(torch, stored_dtype(start)))
        save_model(model, folder, tokenizer_from=start)
        shutil.rmtree(work)
        return {"divergence_nats": divergence_B.tolist()}

    return np.array(piece(target, make)["divergence_nats"])


def _history(results: Sequence[Divergences]) -> Iterator[dict[str, Any]]:
    """One entry per round: who stood where, how sure that is, how much the order changed."""
    for before, after in pairwise(results):
        yield {
            "divergence_nats": {name: float(after[name].mean()) for name in order(after)},
            "leader_share": leader_share(after),
            "rank_agreement": rank_agreement(order(before), order(after)),
        }


def _against(results: Sequence[Divergences], winner: str, first: str) -> dict[str, Any]:
    """The winner against the first choice in the last round that saw both, and which that was."""
    number, both = [(n, found) for n, found in enumerate(results, 1) if first in found][-1]
    return {"round": number, **compared(both[winner], both[first]).as_dict()}
