"""What a limit on time did to the choice of sizes, in tables."""

from trt_kd.reporting.formatting import MISSING, significant, times
from trt_kd.reporting.search_model import CornerRecord, SizeSearch, TimeLimit
from trt_kd.reporting.tables import Cell, Row, Table

NAMES = {"itl_ms": "ITL (ms)", "ttft_ms": "TTFT (ms)", "token_ms": "Per output token (ms)"}
"""Columns of the limits."""


def corners(search: SizeSearch) -> Table:
    """Every lane unpruned, then the best of every lane pruned to the limit."""
    if search.latency is None:
        return Table("Lane", [], [])
    names = list(search.latency.limits)
    rows = [
        Row(
            one.where,
            [
                Cell(one.name),
                *(Cell(significant(one.costs[name]) if one.costs else MISSING) for name in names),
                Cell("" if one.nats is None else significant(one.nats)),
                Cell("yes" if one.fits else "no"),
            ],
            detail="searched" if _is_chosen(one, search.latency) else "",
        )
        for one in search.latency.corners
    ]
    limits = ", ".join(
        f"{NAMES[name]} at most {significant(ms)}" for name, ms in search.latency.limits.items()
    )
    asked = search.latency.limit
    workload = []
    if all(one.batch is None for one in search.latency.corners):
        workload.append(f"batch size {asked['batch']}")
    if asked.get("input_tokens") is not None:
        workload.append(f"{asked['input_tokens']} + {asked['output_tokens']} tokens")
    begin = f"{', '.join(workload)}; ".capitalize() if workload else ""
    errors = ", ".join(
        f"{NAMES[metric].partition(' ')[0]} {share:.1%}"
        for metric, share in search.latency.prediction_errors.items()
    )
    return Table(
        "Lane",
        ["Sizes", *(NAMES[name] for name in names), "Divergence (nats)", "Fits"],
        rows,
        f"{begin}{limits}. Times of the unpruned model are "
        f"measured, the others predicted (median error: {errors}); divergence adds up what format "
        "and cut cost before any training. A lane that fits unpruned is pruned as little as gains "
        "anything, one that no sizes bring to the limit as near as they get.",
    )


def _is_chosen(one: CornerRecord, limit: TimeLimit) -> bool:
    """Whether the verdict names this corner; in older records, whether its lane was searched."""
    if limit.verdict is None:
        return one.fits and one.lane == limit.lane
    chosen = limit.verdict
    return (one.lane, one.batch, one.name) == (chosen.lane, chosen.batch, chosen.name)


def timed(search: SizeSearch) -> Table:
    """Every candidate that was timed before anything else was spent on it."""
    if search.latency is None:
        return Table("Candidate", [], [])
    rows = [
        Row(
            one.name,
            [
                Cell(NAMES[name].rpartition(" (")[0]),
                Cell(significant(one.predicted[name])),
                Cell(significant(one.measured[name])),
                Cell(significant(one.before[name])),
                Cell(significant(one.limits[name])),
                Cell(times(one.speedup[name])),
                Cell(one.verdict),
            ],
        )
        for one in search.latency.tried
        for name in search.latency.limits
    ]
    return Table(
        "Candidate",
        ["Time", "Predicted (ms)", "Measured (ms)", "Unpruned (ms)", "Limit (ms)", "Speed-up", ""],
        rows,
        "Timed on the runtime in turns with the unpruned model, before cutting and training; "
        "predictions are of the latency table's own hour.",
    )
