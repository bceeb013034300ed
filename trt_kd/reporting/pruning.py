"""What was cut: the prune stage's record and both shapes, checked against each other."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from trt_kd.architectures.shape import ModelShape
from trt_kd.artifacts import Artifact
from trt_kd.pruning.budget import MB, memory_table
from trt_kd.pruning.catalogue import SIZES, catalogue
from trt_kd.reporting.collect import Sources, pruned_of, shape_of
from trt_kd.reporting.model import (
    LayerCut,
    MemoryForecast,
    PartCount,
    Pruning,
    Refitted,
    Role,
    SizeChange,
    Variant,
)

Projection = Literal["attention", "output", "mlp", "router", "experts", "down"]
PROJECTIONS: dict[str, Projection] = {
    "qkv_proj": "attention",
    "o_proj": "output",
    "gate_up_proj": "mlp",
    "router": "router",
    "experts": "experts",
    "down_proj": "down",
}
"""What is refit, by the first part of its name in the record."""
HEAD = "lm_head"
"""The head, which belongs to no layer."""
UNTIMED = {2048: [1, 8, 64]}
"""Batch sizes by tokens where no benchmark names any."""


def pruning_of(sources: Sources, rows: Sequence[Variant]) -> Pruning | None:
    """What was cut out of the teacher, or None where nothing was; ``rows`` tell what was timed.

    Metrics that the pruned artifact lacks, or that do not fit its shape, are left out and named.
    """
    teacher, cut = sources.roles.get("teacher"), pruned_of(sources)
    if teacher is None or cut is None:
        return None
    before, after = shape_of(teacher["model"]), shape_of(cut)
    if before is None or after is None:
        return None
    missing: list[str] = []
    workloads = _workloads(rows)
    if not workloads:
        missing.append("Nothing was timed: memory is predicted for 2,048 tokens.")
    role: Role = "student" if "student" in sources.roles else "pruned"
    return Pruning(
        before="teacher",
        after=role,
        parts=_parts(before, after),
        sizes=_sizes(before, after),
        layers=_layers(cut, before, after, missing),
        memory=[
            *_memory("teacher", before, workloads or UNTIMED),
            *_memory(role, after, workloads or UNTIMED),
        ],
        calibration_tokens=_whole(cut, "calibration_tokens"),
        importance_pass_s=_number(cut.metrics.get("importance_pass_s")),
        missing=missing,
    )


def _workloads(rows: Sequence[Variant]) -> dict[int, list[int]]:
    """Batch sizes that were timed, by tokens of a sequence."""
    pairs = {(r.input_tokens + r.output_tokens, r.batch_size) for v in rows for r in v.speed}
    found: dict[int, list[int]] = {}
    for tokens, batch in sorted(pairs):
        found.setdefault(tokens, []).append(batch)
    return found


def _parts(before: ModelShape, after: ModelShape) -> list[PartCount]:
    old, new = before.parts(), after.parts()
    counts = [(name, old.get(name, 0), new.get(name, 0)) for name in {**old, **new}]
    return [
        PartCount(name=name, parameters_before=first, parameters_after=second)
        for name, first, second in counts
        if first or second
    ]


def _sizes(before: ModelShape, after: ModelShape) -> list[SizeChange]:
    names = ("layers", *(name for name in SIZES if name != "layers"))
    pairs = [(name, getattr(before, name), getattr(after, name)) for name in names]
    return [SizeChange(name=name, before=a, after=b) for name, a, b in pairs if a or b]


def _memory(
    role: Role, shape: ModelShape, workloads: Mapping[int, list[int]]
) -> list[MemoryForecast]:
    found = []
    for name, stored in catalogue().formats.items():
        cache = "fp32" if stored.rest_bits == 32 else "bf16"
        for tokens, batches in workloads.items():
            rows = memory_table(
                shape, formats=[name], batches=batches, tokens=tokens, kv_format=cache
            )
            found += [
                MemoryForecast(
                    role=role,
                    weight_format=name,
                    bits_per_weight=row["bits_per_weight"],
                    kv_format=cache,
                    batch_size=row["batch"],
                    tokens=tokens,
                    weights_bytes=round(row["weights_mb"] * MB),
                    kv_cache_bytes=round(row["kv_cache_mb"] * MB),
                )
                for row in rows
            ]
    return found


def _layers(
    cut: Artifact, before: ModelShape, after: ModelShape, missing: list[str]
) -> list[LayerCut]:
    recorded = cut.metrics.get("parameters_before")
    if isinstance(recorded, int) and recorded != before.parameters:
        missing.append(
            f"The last cut was made of a model of {recorded:,} parameters, not of the teacher: "
            "its layers are left out."
        )
        return []
    influence = _numbers(cut, "block_influence", before.layers, "Block influence", missing)
    kept = _kept(cut, before, after, missing)
    refits = _refits(cut, before, after, missing)
    if influence is None and not refits and all(kept):
        return []
    return [
        LayerCut(
            layer=layer,
            kept=kept[layer],
            block_influence=influence[layer] if influence else None,
            refits=refits.get(layer, []),
        )
        for layer in range(before.layers)
    ]


def _kept(
    cut: Artifact, before: ModelShape, after: ModelShape, missing: list[str]
) -> Sequence[bool | None]:
    if after.layers == before.layers:
        return [True] * before.layers
    recorded = cut.metrics.get("kept_layers")
    found = recorded if isinstance(recorded, list) else []
    kept = [layer in found for layer in range(before.layers)]
    if sum(kept) != after.layers:
        missing.append(
            f"{before.layers - after.layers} of {before.layers} layers were dropped; "
            "which ones was not recorded."
        )
        return [None] * before.layers
    return kept


def _refits(
    cut: Artifact, before: ModelShape, after: ModelShape, missing: list[str]
) -> dict[int, list[Refitted]]:
    """Refitted projections by layer before the cut."""
    recorded, config = cut.metrics.get("refits"), cut.manifest.config
    if recorded is None:
        if any(getattr(after, name) < getattr(before, name) for name in ("ffn", "heads")):
            off = "reconstruct" in config and config["reconstruct"] is None
            missing.append(
                "No projection was refit: reconstruct was off."
                if off
                else "What was lost before and after the refit was not recorded."
            )
        return {}
    found: dict[int, list[Refitted]] = {}
    for entry in recorded if isinstance(recorded, list) else [recorded]:
        if isinstance(entry, dict) and entry.get("projection") == HEAD:
            continue
        layer, refitted = _refitted(entry)
        if refitted is None or not 0 <= layer < before.layers:
            missing.append(
                "What was lost before and after the refit is left out: an entry of refits is not "
                "one of this model."
            )
            return {}
        found.setdefault(layer, []).append(refitted)
    return {layer: _merged(refits) for layer, refits in found.items()}


def _merged(refits: Sequence[Refitted]) -> list[Refitted]:
    """Experts of one layer as one: means over them, and the ridge if all have the same."""
    found = []
    for kind in dict.fromkeys(refit.projection for refit in refits):
        same = [refit for refit in refits if refit.projection == kind]
        ridges = {refit.ridge for refit in same}
        found.append(
            same[0].model_copy(
                update={
                    "plain_energy_lost": _mean([refit.plain_energy_lost for refit in same]),
                    "refit_energy_lost": _mean([refit.refit_energy_lost for refit in same]),
                    "ridge": same[0].ridge if len(ridges) == 1 else None,
                }
            )
        )
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _refitted(entry: Any) -> tuple[int, Refitted | None]:
    """Layer and refit of one entry of the record; None where it is damaged."""
    if not isinstance(entry, dict) or not isinstance(entry.get("layer"), int):
        return 0, None
    plain, refit = _number(entry.get("plain_residual")), _number(entry.get("residual"))
    # The record has null where the plain cut did best.
    best = entry.get("ridge", "")
    ridge = "plain cut" if best is None else _number(best)
    projection = PROJECTIONS.get(str(entry.get("projection")).partition(".")[0])
    if projection is None or plain is None or refit is None or ridge is None:
        return 0, None
    return entry["layer"], Refitted(
        projection=projection,
        plain_energy_lost=plain,
        refit_energy_lost=refit,
        ridge=ridge,
    )


def _numbers(
    cut: Artifact, name: str, count: int, what: str, missing: list[str]
) -> list[float] | None:
    """A metric as ``count`` finite numbers; else None, and ``missing`` says why."""
    value = cut.metrics.get(name)
    if value is None:
        missing.append(f"{what} was not recorded.")
        return None
    found = [_number(each) for each in value] if isinstance(value, list) else []
    numbers = [each for each in found if each is not None]
    if len(numbers) != len(found) or len(found) != count:
        missing.append(f"{what} is left out: {name} is not a list of {count} numbers.")
        return None
    return numbers


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _whole(cut: Artifact, name: str) -> int | None:
    value = cut.metrics.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
