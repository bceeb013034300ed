"""Choose among candidates: rank them all by prediction, make and measure the best, let them train.

Everything that took time stands in the work directory, candidate by candidate.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trt_kd.architectures.shape import ModelShape
from trt_kd.artifacts import RESULT, Artifact, piece
from trt_kd.checkpoints import load_model, load_tokenizer
from trt_kd.data.base import token_blocks
from trt_kd.errors import ConfigError
from trt_kd.pruning.budget import Budget
from trt_kd.pruning.candidates import Candidate, possible
from trt_kd.pruning.halving import compared, order, rank_agreement
from trt_kd.pruning.search import Ranked, Search, name_of, open_axes, ranked
from trt_kd.pruning.sensitivity import read_points
from trt_kd.pruning.sizes import settled
from trt_kd.stages.confirming import bench_of
from trt_kd.stages.cutting import cut_checkpoint, on_accelerator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trt_kd.pruning.divergence import Reference
    from trt_kd.stages.prune import PruneConfig

Divergences = dict[str, NDArray[np.float64]]
"""By candidate: divergence from the unpruned model of every block, in nats per token."""


@dataclass(frozen=True)
class Trial:
    """What all candidates are made from and measured with."""

    config: "PruneConfig"
    origin: Artifact
    shape: ModelShape
    calibration: NDArray[np.int64]
    """Token ids ``[blocks, tokens]``."""
    scores: Path
    work: Path
    latency: Artifact | None = None
    """Table behind the limits on time."""

    @property
    def source(self) -> Path:
        """Folder of the unpruned model."""
        return self.origin.path

    @property
    def search(self) -> Search:
        """How to choose.

        Raises:
            ConfigError: if there is nothing to choose.
        """
        if self.config.searching is None:
            raise ConfigError("fewer than two axes are open", hint="leave out their sizes")
        return self.config.searching

    @property
    def check_blocks(self) -> int:
        """Blocks on which candidates are measured."""
        return max(2, -(-self.search.check_tokens // self.config.data.block_tokens))

    def text(self, count: int, *, offset: int) -> NDArray[np.int64]:
        """Token ids of ``count`` training blocks, ``offset`` blocks behind the calibration text."""
        return token_blocks(
            self.config.data,
            load_tokenizer(self.source),
            split="train",
            count=count,
            offset=len(self.calibration) + offset,
            seed=self.config.seed,
        )

    @cached_property
    def reference(self) -> "Reference":
        """The unpruned model's answers."""
        import torch

        from trt_kd.pruning.divergence import Reference

        model = on_accelerator(load_model(self.source, dtype="float32"))
        return Reference(model, [*torch.from_numpy(self.text(self.check_blocks, offset=0))])


def choose(trial: Trial, out: Path) -> dict[str, Any]:
    """Write the best candidate into ``out``; return its measurements and the search's record.

    Raises:
        ModelError: if no candidate is within the search's limits.
    """
    from trt_kd.stages.tournament import hold

    config, search = trial.config, trial.search
    if config.budget is None:
        raise ConfigError("a search needs a budget", hint="give budget.params or budget.memory_mb")
    axes = open_axes(config.axes)
    points = read_points(trial.scores)
    budget, bench = config.budget, None
    if trial.latency is not None:
        bench = bench_of(config, trial.latency, trial.origin, trial.work, points=points)
        budget = bench.corrected()

    def fitting(within: Budget) -> list[Candidate]:
        return possible(config.axes, trial.shape, within, config.target, slack=search.slack)

    def rank(within: Budget) -> list[Ranked]:
        return ranked(fitting(within), points, axes, search)

    candidates = fitting(budget)
    everything = ranked(candidates, points, axes, search)
    shortlist = everything[: search.top_k]
    if bench is not None:
        shortlist = bench.confirm(everything, rank, search.top_k)
    names = {name_of(one.candidate.shape, axes): one for one in shortlist}
    measured: Divergences = {}
    metrics: dict[str, dict[str, Any]] = {}
    for name, one in names.items():
        metrics[name] = _made(trial, name, one)
        measured[name] = np.array(metrics[name].pop("divergence_nats"))
    winner, held = order(measured)[0], None
    if search.tournament is not None and len(measured) > 1:
        held = hold(trial, search.tournament, measured, first=next(iter(names)))
        winner = held["winner"]
    shutil.copytree(
        trial.work / "candidates" / winner,
        out,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns(RESULT),
    )
    record = {
        "candidates_legal": len(candidates),
        "candidates_within_limits": len(everything),
        "check_tokens": trial.check_blocks * config.data.block_tokens,
        "measured": [_row(name, one, measured[name]) for name, one in names.items()],
        **_quality(names, measured),
        "sensitivity": [vars(point) for point in points],
        "tournament": held,
        "winner": winner,
        "latency": bench.record() if bench is not None else None,
    }
    return metrics[winner] | {"search": record}


def _made(trial: Trial, name: str, one: Ranked) -> dict[str, Any]:
    """Make one candidate and measure it, unless that was done before the last kill."""
    config = trial.config.model_copy(
        update={
            "axes": settled(trial.config.axes, one.candidate.shape),
            "budget": None,
            "search": None,
        }
    )

    def measure(model: "PreTrainedModel") -> dict[str, Any]:
        return {"divergence_nats": trial.reference.divergence(model).tolist()}

    def make(folder: Path) -> dict[str, Any]:
        return cut_checkpoint(
            config, trial.source, trial.calibration, folder, scores=trial.scores, measure=measure
        )

    return piece(trial.work / "candidates" / name, make)


def _row(name: str, one: Ranked, divergence_B: NDArray[np.float64]) -> dict[str, Any]:
    """What a report shows of a candidate."""
    candidate = one.candidate
    return {
        "name": name,
        "sizes": candidate.changed,
        "parameters": candidate.parameters,
        "memory_bytes": candidate.memory_bytes,
        "predicted_nats": one.predicted_nats,
        "divergence_nats": float(divergence_B.mean()),
        "divergence_stderr_nats": float(divergence_B.std(ddof=1) / len(divergence_B) ** 0.5),
    }


def _quality(names: Mapping[str, Ranked], measured: Divergences) -> dict[str, Any]:
    """How good the predictions were."""
    ratios = [float(measured[name].mean()) / one.predicted_nats for name, one in names.items()]
    best, first = order(measured)[0], next(iter(names))
    return {
        "measured_over_predicted": float(np.median(ratios)),
        "rank_agreement": rank_agreement(list(names), order(measured)),
        "best_against_first": compared(measured[best], measured[first]).as_dict(),
    }
