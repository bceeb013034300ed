"""The dry run of pruning: which sizes fit, what they cost, and whether the target takes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_kd.cli.console import print_json, table

if TYPE_CHECKING:
    from trt_kd.architectures.shape import ModelShape
    from trt_kd.pruning.budget import Budget
    from trt_kd.pruning.candidates import Candidate, SearchSpace
    from trt_kd.pruning.catalogue import Target
    from trt_kd.stages.confirming import Corner

_SHOWN = 20


def print_candidates(
    candidates: "Sequence[Candidate]",
    shape: "ModelShape",
    budget: "Budget",
    target: "Target",
    *,
    as_json: bool = False,
    limit: int = _SHOWN,
) -> None:
    """Print the candidates for pruning a model of ``shape``, as a table or as JSON.

    The table has the first ``limit`` of them, in their order; JSON has all.
    """
    if as_json:
        print_json(candidates_json(candidates, shape, budget, target))
        return
    print(f"{shape.parameters:,} parameters before; {_limits(shape, budget)}; for {target}\n")
    print(table(candidate_rows(candidates[:limit], shape, budget)))
    hidden = len(candidates) - limit
    if hidden > 0:
        print(f"\nand {hidden:,} more; --json prints all")


def dry_run(
    config: "SearchSpace", directory: Path, *, table: Path | None = None, as_json: bool = False
) -> None:
    """Print what ``config`` could make of the model in ``directory``, from its config.json alone.

    Axes without a size are tried at every legal one, together. With a latency table ``table`` the
    corners come first, the unpruned model in every lane before the best that is pruned.

    Raises:
        TrtKdError: if nothing is legal or fits, or an axis is not the model's.
    """
    from trt_kd.architectures.shape import read_shape
    from trt_kd.pruning.candidates import possible

    shape = read_shape(directory)
    if table is not None:
        _dry_run_in_time(config, shape, table, as_json=as_json)
        return
    found = possible(config.axes, shape, config.budget, config.target)
    budget = config.budget.deployed(config.target)
    print_candidates(found, shape, budget, config.target, as_json=as_json)


def _dry_run_in_time(
    config: "SearchSpace", shape: "ModelShape", place: Path, *, as_json: bool
) -> None:
    from dataclasses import asdict

    from trt_kd.errors import ConfigError
    from trt_kd.latency.table import read_table
    from trt_kd.pruning.budget import limited
    from trt_kd.pruning.candidates import possible
    from trt_kd.pruning.latency_limit import stopwatch
    from trt_kd.stages.confirming import corners

    _, limit = limited(config.budget)
    timed = read_table(place)
    if timed.shape != shape:
        raise ConfigError(
            f"the latency table in {place} is of another model",
            hint="make one of this model with trt-kd latency-table",
        )
    found = corners(config.budget, timed, config.axes, config.target)
    lane = next((one.lane for one in found if one.fits and one.name != "unpruned"), None)
    rows = [asdict(one) for one in found]
    if lane is None:
        if as_json:
            print_json({"schema_version": 1, "corners": rows, "candidates": []})
        else:
            print(f"{table(corner_rows(found))}\n\nit fits unpruned: there is nothing to prune for")
        return
    watch = stopwatch(limit, timed, lane)
    budget = config.budget.timed_by(watch).deployed(config.target)
    candidates = possible(config.axes, shape, budget, config.target)
    if as_json:
        stated = {"lengths": watch.lengths._asdict(), "prediction_errors": watch.errors()}
        told = candidates_json(candidates, shape, budget, config.target)
        print_json(told | {"corners": rows} | stated)
        return
    errors = ", ".join(f"{metric} {share:.1%}" for metric, share in watch.errors().items())
    print(f"{table(corner_rows(found))}\n")
    print(
        f"batch size {limit.batch}, {watch.lengths} tokens; predictions off by {errors} (median)\n"
    )
    print_candidates(candidates, shape, budget, config.target)


def corner_rows(found: "Sequence[Corner]") -> list[list[str]]:
    """Rows of the table of corners, the heading first."""
    from trt_kd.pruning.budget import amount

    names = list(found[0].costs)
    rows = [["lane", "sizes", *names, "fits"]]
    for one in found:
        told = [amount(name, one.costs[name]) for name in names]
        rows.append([one.lane, one.name, *told, "yes" if one.fits else "no"])
    return rows


def candidate_rows(
    candidates: "Sequence[Candidate]", shape: "ModelShape", budget: "Budget | None" = None
) -> list[list[str]]:
    """Rows of the table, the heading first: sizes, parameters, share, memory, legality."""
    from trt_kd.pruning.budget import MB

    names = list(dict.fromkeys(name for one in candidates for name in one.changed))
    active = ["active"] if shape.experts else []
    watch = budget.stopwatch if budget is not None else None
    times = list(watch.limits()) if watch else []
    rows = [[*names, "parameters", *active, "share", "memory MB", *times, "legal"]]
    for one in candidates:
        sizes = [str(getattr(one.shape, name)) for name in names]
        counts = [f"{one.parameters:,}"] + ([f"{one.active_parameters:,}"] if active else [])
        memory = f"{one.memory_bytes / MB:,.1f}"
        ms = watch.values(one.shape) if watch else {}
        told = [f"{ms[name]:,.2f}" for name in times]
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
    candidates: "Sequence[Candidate]", shape: "ModelShape", budget: "Budget", target: "Target"
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
            for one in candidates
        ],
    }


def _limits(shape: "ModelShape", budget: "Budget") -> str:
    from trt_kd.pruning.budget import amount

    limits = budget.limits(shape).items()
    return "at most " + " and ".join(amount(name, value) for name, value in limits)
