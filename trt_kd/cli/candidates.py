"""The dry run of pruning: which sizes fit, what they cost, and whether the target takes them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_kd.cli.console import print_json, table
from trt_kd.errors import ConfigError

if TYPE_CHECKING:
    from trt_kd.architectures.shape import ModelShape
    from trt_kd.pruning.budget import Budget
    from trt_kd.pruning.candidates import Candidate, SearchSpace
    from trt_kd.pruning.catalogue import Target
    from trt_kd.pruning.search import Search
    from trt_kd.pruning.sensitivity import Point
    from trt_kd.stages.corners import Corner
    from trt_kd.stages.prune import PruneConfig

_SHOWN = 20


def print_candidates(
    candidates: "Sequence[Candidate]",
    shape: "ModelShape",
    budget: "Budget",
    target: "Target",
    *,
    nats: "Sequence[float] | None" = None,
    limit: int = _SHOWN,
) -> None:
    """Print the first ``limit`` candidates for pruning a model of ``shape``, in their order.

    ``nats`` are what their cuts are predicted to cost, where that is known.
    """
    print(f"{shape.parameters:,} parameters before; {_limits(shape, budget)}; for {target}\n")
    shown = nats[:limit] if nats is not None else None
    print(table(candidate_rows(candidates[:limit], shape, budget, shown)))
    hidden = len(candidates) - limit
    if hidden > 0:
        print(f"\nand {hidden:,} more; --json prints all")


def dry_run(
    config: "SearchSpace | PruneConfig",
    directory: Path,
    *,
    table: Path | None = None,
    scores: Path | None = None,
    as_json: bool = False,
) -> None:
    """Print what ``config`` could make of the model in ``directory``, from its config.json alone.

    Axes without a size are tried at every legal one, together. With a latency table ``table`` the
    corners come first, the unpruned model in every lane before the best that is pruned, and
    whether pruning pays. With ``scores`` candidates are ranked by what their cuts will cost.

    Raises:
        TrtKdError: if nothing is legal or fits, or an axis is not the model's.
    """
    from trt_kd.architectures.shape import read_shape
    from trt_kd.pruning.candidates import possible
    from trt_kd.pruning.search import Search, open_axes, ranked
    from trt_kd.pruning.sensitivity import read_points

    shape, budget = read_shape(directory), config.budget
    if budget is None:
        raise ConfigError("which sizes fit what?", hint="give a budget, such as budget.params=80%")
    points = read_points(scores) if scores is not None else []
    search = getattr(config, "searching", None) or Search()
    found: dict[str, Any] = {}
    if table is not None:
        budget, found = _in_time(config, shape, table, points, search)
        if not as_json:
            _print_corners(found)
    candidates, nats = [], None
    if not found or found["verdict"].pruning_pays:
        slack = {"slack": search.slack} if points else {}
        candidates = possible(config.axes, shape, budget, config.target, **slack)
    budget = budget.deployed(config.target)
    if points and candidates:
        first = ranked(candidates, points, open_axes(config.axes), search)
        candidates = [one.candidate for one in first]
        nats = [one.predicted_nats for one in first]
    if as_json:
        told = candidates_json(candidates, shape, budget, config.target, nats=nats)
        print_json(told | _corners_json(found))
    elif candidates:
        print_candidates(candidates, shape, budget, config.target, nats=nats)


def ranking(config: "PruneConfig", inputs: Mapping[str, Path], *, as_json: bool = False) -> None:
    """Print what a search would choose from, by role of its ``inputs``; cut and time nothing.

    Raises:
        TrtKdError: as the search would.
    """
    from trt_kd.artifacts import Artifact
    from trt_kd.stages.prune import check_scores

    source = Artifact.open(inputs["source"], expect="checkpoint")
    if config.searching is None or "scores" not in inputs:
        raise ConfigError(
            "a search ranks sizes of several axes by their scores",
            hint="leave two axes without a size and give --scores, or look with trt-kd prune "
            "--dry-run",
        )
    check_scores(config, Artifact.open(inputs["scores"], expect="scores"), source)
    table, scores = inputs.get("latency"), inputs["scores"]
    dry_run(config, source.path, table=table, scores=scores, as_json=as_json)


def _in_time(
    config: "SearchSpace | PruneConfig",
    shape: "ModelShape",
    place: Path,
    points: "Sequence[Point]",
    search: "Search",
) -> "tuple[Budget, dict[str, Any]]":
    """The budget held against the lane that the corners speak for, and the corners."""
    from trt_kd.latency.table import read_table
    from trt_kd.pruning.budget import limited
    from trt_kd.stages.corners import corners, limits_of, verdict_of, watch_of

    budget, limit = limited(config.budget)
    timed = read_table(place)
    if timed.shape != shape:
        raise ConfigError(
            f"the latency table in {place} is of another model",
            hint="make one of this model with trt-kd latency-table",
        )
    found = corners(budget, timed, config.axes, config.target, points=points, search=search)
    verdict = verdict_of(found, limits_of(budget, timed))
    watch = watch_of(limit, timed, verdict, budget)
    return budget.timed_by(watch), {"corners": found, "verdict": verdict, "watch": watch}


def _corners_json(found: dict[str, Any]) -> dict[str, Any]:
    from trt_kd.stages.corners import told

    if not found:
        return {}
    watch = found["watch"]
    stated = {"lengths": watch.lengths._asdict(), "prediction_errors": watch.errors()}
    return told(found["corners"], found["verdict"]) | stated


def _print_corners(found: dict[str, Any]) -> None:
    watch = found["watch"]
    errors = ", ".join(f"{metric} {share:.1%}" for metric, share in watch.errors().items())
    print(f"{table(corner_rows(found['corners']))}\n\n{found['verdict'].words}\n")
    print(
        f"batch size {watch.limit.batch}, {watch.lengths} tokens; "
        f"predictions off by {errors} (median)\n"
    )


def corner_rows(found: "Sequence[Corner]") -> list[list[str]]:
    """Rows of the table of corners, the heading first."""
    from trt_kd.pruning.budget import amount

    names = list(found[0].costs)
    rows = [["lane", "sizes", *names, "nats", "fits"]]
    for one in found:
        costs = [amount(name, one.costs[name]) if one.costs else "-" for name in names]
        nats = "-" if one.nats is None else f"{one.nats:.3f}"
        rows.append([one.where, one.name, *costs, nats, "yes" if one.fits else "no"])
    return rows


def candidate_rows(
    candidates: "Sequence[Candidate]",
    shape: "ModelShape",
    budget: "Budget | None" = None,
    nats: "Sequence[float] | None" = None,
) -> list[list[str]]:
    """Rows of the table, the heading first: sizes, parameters, share, memory, cost, legality."""
    from trt_kd.pruning.budget import MB

    names = list(dict.fromkeys(name for one in candidates for name in one.changed))
    active = ["active"] if shape.experts else []
    watch = budget.stopwatch if budget is not None else None
    times = list(watch.limits()) if watch else []
    rows = [[*names, "parameters", *active, "share", "memory MB", *times]]
    rows[0] += ["nats", "legal"] if nats is not None else ["legal"]
    for number, one in enumerate(candidates):
        sizes = [str(getattr(one.shape, name)) for name in names]
        counts = [f"{one.parameters:,}"] + ([f"{one.active_parameters:,}"] if active else [])
        memory = f"{one.memory_bytes / MB:,.1f}"
        ms = watch.values(one.shape) if watch else {}
        told = [f"{ms[name]:,.2f}" for name in times]
        if nats is not None:
            told.append(f"{nats[number]:.3f}")
        rows.append([*sizes, *counts, f"{one.share:.1%}", memory, *told, legality(one)])
    return rows


def legality(candidate: "Candidate") -> str:
    """Whether the target takes the sizes, and if not gladly, which and why."""
    if not candidate.violations:
        return "yes"
    told = []
    for found in candidate.violations:
        prefix = "as before, " if found.size not in candidate.changed else ""
        told.append(f"{prefix}{found.severity}: {found.subject}, {found.what}")
    return "; ".join(told)


def candidates_json(
    candidates: "Sequence[Candidate]",
    shape: "ModelShape",
    budget: "Budget",
    target: "Target",
    *,
    nats: "Sequence[float] | None" = None,
) -> dict[str, Any]:
    """Everything about the candidates, for a program to read."""
    return {
        "schema_version": 1,
        "parameters_before": shape.parameters,
        "limits": budget.limits(shape),
        "budget": budget.model_dump(mode="json"),
        "target": target.model_dump(mode="json"),
        "candidates": [
            {
                "sizes": one.changed,
                "parameters": one.parameters,
                "active_parameters": one.active_parameters,
                "share": one.share,
                "memory_bytes": one.memory_bytes,
                "predicted_nats": None if nats is None else nats[number],
                "costs": {name: float(cost) for name, cost in budget.values(one.shape).items()},
                "violations": [
                    {
                        "size": found.size,
                        "value": found.value,
                        "severity": found.severity,
                        "rule": found.rule,
                        "what": found.what,
                        "reason": found.reason,
                        "nearest": [s for s in (found.below, found.above) if s is not None],
                    }
                    for found in one.violations
                ],
            }
            for number, one in enumerate(candidates)
        ],
    }


def _limits(shape: "ModelShape", budget: "Budget") -> str:
    from trt_kd.pruning.budget import amount

    limits = budget.limits(shape).items()
    return "at most " + " and ".join(amount(name, value) for name, value in limits)
