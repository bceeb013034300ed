"""Tables of what was cut: parameters by part, sizes, layers, predicted memory."""

from trt_kd.reporting.formatting import (
    MISSING,
    bytes_text,
    duration,
    fixed,
    percent_change,
    significant,
)
from trt_kd.reporting.model import MemoryForecast, Pruning, Refitted, Report, Role
from trt_kd.reporting.tables import Cell, Row, Table

PARTS = {"mlp": "MLP", "lm_head": "vocabulary head"}
SIZES = {
    "hidden": "width of the residual stream",
    "ffn": "channels of an MLP",
    "expert_ffn": "channels of an expert",
    "heads": "query heads",
    "kv_heads": "key-value heads",
    "head_dim": "channels of a head",
    "vocab": "tokens of the vocabulary",
    "experts": "experts of a layer",
}
PROJECTIONS = {
    "attention": "queries, keys and values",
    "output": "output projection",
    "mlp": "gate and up projections",
    "router": "router",
    "experts": "experts' down projections",
    "down": "down projection",
}


def names(report: Report, pruning: Pruning) -> tuple[str, str]:
    """What the models before and after are called."""
    return _name(report, pruning.before), _name(report, pruning.after)


def _name(report: Report, role: Role) -> str:
    variant = report.variant(role)
    return variant.name if variant else role


def parts(report: Report, pruning: Pruning) -> Table:
    """Parameters by part before and after, each with its share of the model."""
    rows = [(p.name, p.parameters_before, p.parameters_after) for p in pruning.parts]
    totals = sum(row[1] for row in rows), sum(row[2] for row in rows)
    rows.append(("total", *totals))
    old, new = names(report, pruning)
    return Table(
        "Part",
        ["Parameters (M)", "Share (%)", "Parameters (M)", "Share (%)"],
        [
            Row(
                PARTS.get(name, name),
                [
                    Cell(significant(first / 1e6, 4)),
                    Cell(_percent(first, totals[0])),
                    Cell(significant(second / 1e6, 4), change=percent_change(second, first)),
                    Cell(_percent(second, totals[1])),
                ],
            )
            for name, first, second in rows
        ],
        "Shares are of the whole model. A head tied to the embedding counts there.",
        [(old, 2), (new, 2)],
    )


def _percent(count: int, total: int) -> str:
    return fixed(100 * count / total, 1) if total else MISSING


def sizes(report: Report, pruning: Pruning) -> Table:
    """Sizes by name before and after."""
    rows = [
        Row(
            size.name,
            [
                Cell(f"{size.before:,}"),
                Cell(
                    f"{size.after:,}",
                    change="same"
                    if size.after == size.before
                    else percent_change(size.after, size.before),
                ),
            ],
            detail=SIZES.get(size.name, ""),
        )
        for size in pruning.sizes
    ]
    return Table("Size", list(names(report, pruning)), rows)


def layers(pruning: Pruning) -> Table:
    """Every layer before the cut: kept or dropped, sensitivity, what its refits gave back."""
    kinds = list(dict.fromkeys(r.projection for layer in pruning.layers for r in layer.refits))
    columns = ["Kept", "Block influence"]
    groups = [("Layer", 2)]
    for kind in kinds:
        columns += ["Lost, plain cut (%)", "Lost, refit (%)", "Ridge"]
        groups.append((PROJECTIONS[kind].capitalize(), 3))
    rows = []
    for layer in pruning.layers:
        kept = {True: "yes", False: "dropped", None: MISSING}[layer.kept]
        cells = [Cell(kept), Cell(_significant(layer.block_influence))]
        refits = {refit.projection: refit for refit in layer.refits}
        for kind in kinds:
            cells += _refit_cells(refits.get(kind))
        rows.append(Row(str(layer.layer), cells))
    return Table("Number", columns, rows, _layers_caption(pruning), groups if kinds else [])


def _refit_cells(refit: Refitted | None) -> list[Cell]:
    if refit is None:
        return [Cell(), Cell(), Cell()]
    ridge = refit.ridge
    return [
        Cell(_significant(refit.plain_energy_lost, 100)),
        Cell(_significant(refit.refit_energy_lost, 100)),
        Cell(MISSING if ridge is None else ridge if isinstance(ridge, str) else f"{ridge:g}"),
    ]


def _significant(value: float | None, scale: float = 1.0) -> str:
    return MISSING if value is None else significant(scale * value)


def _layers_caption(pruning: Pruning) -> str:
    kinds = dict.fromkeys(r.projection for layer in pruning.layers for r in layer.refits)
    if not kinds:
        return ""
    named = " and of the ".join(PROJECTIONS[kind] for kind in kinds)
    return (
        f"Lost: squared error of the output of the {named}, over the squared output. Ridge: pull "
        "towards the plain cut that did best outside the fit."
    )


def evidence(pruning: Pruning) -> str:
    """The calibration text behind scores and refit in a sentence; empty where it is unknown."""
    tokens, seconds = pruning.calibration_tokens, pruning.importance_pass_s
    found = f"Scores come from {tokens:,} calibration tokens" if tokens is not None else ""
    if seconds is None:
        return f"{found}." if found else ""
    took = f"scoring pass took {duration(seconds)}"
    return f"{found}; the {took}." if found else f"The {took}."


def memory(report: Report, pruning: Pruning) -> Table:
    """Predicted memory by weight format and workload, before and after; equal formats in one."""
    old, new = names(report, pruning)
    workloads = list(dict.fromkeys((row.batch_size, row.tokens) for row in pruning.memory))
    found: dict[tuple[str, ...], list[MemoryForecast]] = {}
    for name in dict.fromkeys(row.weight_format for row in pruning.memory):
        rows = [row for row in pruning.memory if row.weight_format == name]
        cells = _memory_cells(pruning, rows)
        key = (rows[0].kv_format, *(cell.text() for cell in cells))
        found.setdefault(key, []).append(rows[0])
    made = []
    for same in found.values():
        rows = [row for row in pruning.memory if row.weight_format == same[0].weight_format]
        detail = f"{same[0].bits_per_weight:g} bits a weight, cache {same[0].kv_format}"
        title = ", ".join(row.weight_format for row in same)
        made.append(Row(title, _memory_cells(pruning, rows), detail=detail))
    groups = [("Weights", 2)]
    groups += [(f"Batch {batch}, {tokens:,} tokens", 2) for batch, tokens in workloads]
    caption = (
        "Predicted from the shapes, not measured: weights with their scales, and in the columns by "
        "batch the key-value cache too. Activations and the runtime's own buffers come on top."
    )
    return Table("Weight format", [old, new] * len(groups), made, caption, groups)


def _memory_cells(pruning: Pruning, rows: list[MemoryForecast]) -> list[Cell]:
    old = [row for row in rows if row.role == pruning.before]
    new = [row for row in rows if row.role == pruning.after]
    pairs = [(old[0].weights_bytes, new[0].weights_bytes)]
    for first, second in zip(old, new, strict=True):
        pairs.append(
            (
                first.weights_bytes + first.kv_cache_bytes,
                second.weights_bytes + second.kv_cache_bytes,
            )
        )
    return [
        cell
        for first, second in pairs
        for cell in (
            Cell(bytes_text(first)),
            Cell(bytes_text(second), change=percent_change(second, first)),
        )
    ]
