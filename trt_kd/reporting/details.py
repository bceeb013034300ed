"""The further tables: every timed workload, what each stage cost, the other exports, the gates."""

from collections.abc import Callable

from trt_kd.reporting.formatting import (
    MINUS,
    MISSING,
    TIMES,
    bytes_text,
    duration,
    fixed,
    percent_change,
    signed,
    significant,
    times,
)
from trt_kd.reporting.model import GateResult, Report, Role, Variant
from trt_kd.reporting.readings import client_text, load_text, matching, mean_accuracy
from trt_kd.reporting.speed_figures import slo_text
from trt_kd.reporting.speed_model import LoadRecord, Percentiles, WatchedRecord
from trt_kd.reporting.tables import Cell, Row, Table, scaled

GPU = ("GPU memory", "Power (W)", "Energy (J/token)", "Throttled")
"""Columns of what GPUs told, where one was watched."""


def workloads(report: Report) -> Table:
    """Every workload that our clock timed, of every variant, percentiles included."""
    every = [record for variant in report.variants for record in variant.speed]
    on_gpu = any(record.gpu_power_w is not None for record in every)
    titles = [
        "Batch",
        "In + out",
        "TTFT p50 / p90 / p99 (ms)",
        "ITL p50 / p90 / p99 (ms)",
        "TTFT floor (ms)",
        "Floor / TTFT p50 (%)",
        "ITL floor (ms)",
        "Floor / ITL p50 (%)",
        "Throughput (tok/s)",
        "Peak memory",
        *(GPU if on_gpu else []),
    ]
    base = report.variants[0]
    rows = []
    for variant in report.variants:
        for record in variant.speed:
            if record.under_load:
                continue
            start = matching(report, base, record)
            ratio = record.output_tokens_per_s / start.output_tokens_per_s if start else None
            change = "" if ratio is None or variant is base else times(ratio)
            itl = record.itl_ms
            cells = [
                Cell(str(record.batch_size)),
                Cell(f"{record.input_tokens} + {record.output_tokens}"),
                Cell(_three(record.ttft_ms.p50, record.ttft_ms.p90, record.ttft_ms.p99)),
                Cell(_three(itl.p50, itl.p90, itl.p99)) if itl else Cell(),
                *_floor(record.prefill_floor_ms, record.prefill_bound, record.ttft_ms),
                *_floor(record.decode_floor_ms, record.decode_bound, record.itl_ms),
                Cell(
                    significant(record.output_tokens_per_s),
                    f"{fixed(100 * record.spread, 0)} %",
                    change,
                ),
                Cell(bytes_text(record.peak_memory_bytes) if record.peak_memory_bytes else MISSING),
                *(_gpu_cells(record) if on_gpu else []),
            ]
            steady = "not steady" if record.steady is False else ""
            label = f"{record.backend} {record.format}" + (f"; {steady}" if steady else "")
            rows.append(Row(variant.name, cells, variant is base, label))
    return Table("Variant", titles, rows)


def _gpu_cells(record: WatchedRecord) -> list[Cell]:
    memory, reasons = record.gpu_memory_bytes, record.gpu_throttled
    told = ", ".join(f"{name} {fixed(100 * share, 0)} %" for name, share in (reasons or {}).items())
    return [
        Cell(bytes_text(memory) if memory else MISSING),
        _known(record.gpu_power_w),
        _known(record.energy_j_per_token),
        Cell(MISSING if reasons is None else told or "no"),
    ]


def loads(report: Report) -> Table:
    """Every load of every variant: latencies, throughput, and what of it met the limits."""
    titles = [
        "Load",
        "In + out",
        "TTFT p50 / p90 / p99 (ms)",
        "TPOT p50 / p90 / p99 (ms)",
        "Throughput (tok/s)",
        "Per user (tok/s)",
        "Requests/s",
        "Goodput (requests/s)",
        "Good (%)",
    ]
    every = [record for variant in report.variants for record in variant.load]
    on_gpu = any(record.gpu_power_w is not None for record in every)
    titles += GPU if on_gpu else ()
    rows = []
    for variant in report.variants:
        for record in variant.load:
            notes = ["not steady" if record.steady is False else "", client_text(record)]
            label = "; ".join(filter(None, [f"{record.backend} {record.format}", *notes]))
            cells = _load_cells(record) + (_gpu_cells(record) if on_gpu else [])
            rows.append(Row(variant.name, cells, variant is report.variants[0], label))
    limits = {slo_text(record.slo) for v in report.variants for record in v.load if record.slo}
    said = f"Good: a request with {' or '.join(sorted(limits))}. " if limits else ""
    away = any(record.served_here is False for record in every)
    return Table("Variant", titles, rows, f"{said}{LOADS}{ELSEWHERE if away else ''}")


LOADS = (
    "Percentiles over the requests of a run, medians over runs. Throughput: median over runs, "
    "± half range. Per user: generation only."
)
ELSEWHERE = " A server on another machine: its GPUs were not watched."


def _load_cells(record: LoadRecord) -> list[Cell]:
    good, every = record.goodput_requests_per_s, record.requests_per_s
    return [
        Cell(load_text(record)),
        Cell(f"{record.input_tokens} + {record.output_tokens}"),
        Cell(_three(record.ttft_ms.p50, record.ttft_ms.p90, record.ttft_ms.p99)),
        Cell(_three(record.tpot_ms.p50, record.tpot_ms.p90, record.tpot_ms.p99)),
        Cell(significant(record.output_tokens_per_s), f"{fixed(100 * record.spread, 0)} %"),
        _known(record.tokens_per_s_per_user),
        _known(every),
        _known(good),
        Cell(fixed(100 * good / every, 0)) if good is not None and every else Cell(),
    ]


def _known(value: float | None) -> Cell:
    return Cell() if value is None else Cell(significant(value))


def _floor(
    floor_ms: float | None, bound: str | None, taken: Percentiles | None
) -> tuple[Cell, Cell]:
    """The floor with what sets it, and the share of it that was reached."""
    if not floor_ms:
        return Cell(MISSING), Cell(MISSING)
    share = fixed(100 * floor_ms / taken.p50, 0) if taken else MISSING
    return Cell(significant(floor_ms) + (f" ({bound})" if bound else "")), Cell(share)


def _three(*values: float) -> str:
    return " / ".join(significant(value) for value in values)


STEPS: tuple[tuple[str, tuple[Role, ...], Role, str], ...] = (
    ("Correction of the teacher", ("teacher",), "corrected", "model"),
    ("Pruning", ("corrected", "teacher"), "pruned", "model"),
    ("Distillation", ("pruned",), "student", "model"),
    ("Cross-entropy instead", ("pruned",), "cross_entropy", "model"),
    ("Quantization of the student", ("student",), "student_quantized", "shipped"),
    ("Quantization of the teacher", ("teacher",), "teacher_quantized", "shipped"),
)
"""Title, what there was before (the first of these roles that the report has), after, and part."""


def stage_costs(report: Report) -> Table:
    """What each stage took away and what it gave back: signed changes from before to after."""
    titles = [
        "Parameters", "KL to teacher (nats)", "Top-1 agreement (%)", "Mean task accuracy (%)",
        "KL given back", "Duration",
    ]  # fmt: skip
    rows = []
    for title, before_roles, after_role, part in STEPS:
        found = map(report.variant, before_roles)
        before, after = next(filter(None, found), None), report.variant(after_role)
        if before is None or after is None:
            continue
        seconds = after.seconds.get(part)
        cells = [
            Cell(percent_change(after.parameters, before.parameters)),
            _moved(before, after, lambda v: v.quality.kl_to_teacher_nats, 3),
            _moved(before, after, lambda v: scaled(v.quality.top1_agreement, 100), 1),
            _moved(before, after, lambda v: scaled(mean_accuracy(v), 100), 1),
            Cell(_given_back(before, after) if before.role == "pruned" else MISSING),
            Cell(duration(seconds) if seconds else MISSING),
        ]
        rows.append(Row(title, cells, detail=f"{before.name} to {after.name}"))
    return Table("Stage", titles, rows)


def _moved(
    before: Variant, after: Variant, read: Callable[[Variant], float | None], digits: int
) -> Cell:
    start, end = read(before), read(after)
    if start is None or end is None:
        return Cell()
    return Cell(signed(end - start, digits), "", f"{fixed(start, digits)} to {fixed(end, digits)}")


def _given_back(pruned: Variant, trained: Variant) -> str:
    """Share of the divergence pruning caused that training removed; negative: it added some."""
    start, end = pruned.quality.kl_to_teacher_nats, trained.quality.kl_to_teacher_nats
    if not start or end is None:
        return MISSING
    return f"{signed(100 * (1 - end / start), 0)} %"


def exports(report: Report) -> Table:
    """Further exported artifacts with the check made after writing."""
    titles = ["Size", "KL to its source (nats)", "Same top token (%)", "Artifact"]
    rows = [
        Row(
            export.name,
            [
                Cell(bytes_text(export.size_bytes)),
                Cell(MISSING if export.logits_kl_nats is None else fixed(export.logits_kl_nats, 4)),
                Cell(
                    MISSING
                    if export.top1_agreement is None
                    else fixed(100 * export.top1_agreement, 1)
                ),
                Cell(export.artifact[:12]),
            ],
            detail=f"{export.lane} {export.format}",
        )
        for export in report.exports
    ]
    return Table("Export", titles, rows)


def gates(report: Report) -> Table:
    """Every gate: limit, what was found, interval, verdict."""
    titles = ["Asks for", "Found", "95 % interval", "Method", "Verdict"]
    rows = [
        Row(
            gate.name,
            [
                Cell(asked(report, gate)),
                Cell(MISSING if gate.value is None else _amount(gate, gate.value)),
                Cell(interval_text(gate)),
                Cell("" if gate.method == "exact" else gate.method or MISSING),
                Cell(gate.verdict),
            ],
            detail=gate.reason,
        )
        for gate in report.gates
    ]
    return Table("Gate", titles, rows)


def asked(report: Report, gate: GateResult) -> str:
    """The limit in words: this metric of that variant, at most so much of another's."""
    variant, other = report.variant(gate.variant), report.variant(gate.relative_to)
    name = variant.name if variant else gate.variant
    base = other.name if other else gate.relative_to
    limit = _amount(gate, gate.limit, exact=True)
    text = f"{gate.metric} of {name}: {gate.bound} {limit}"
    if gate.compare == "ratio":
        return f"{text} that of {base}"
    return f"{text} against {base}" if gate.compare == "difference" else text


def interval_text(gate: GateResult) -> str:
    """The interval, or why there is none to show."""
    if gate.interval is None:
        return MISSING
    low, high = gate.interval
    if low == high:
        return "exact"
    return f"{_amount(gate, low)} to {_amount(gate, high)}"


def _amount(gate: GateResult, value: float, *, exact: bool = False) -> str:
    """``value`` in the unit of the gate's metric; ``exact`` keeps the digits of a limit."""
    metric = gate.metric.partition(" ")[0]
    if gate.compare == "ratio":
        return f"{value:g}{TIMES}" if exact else times(value, 3)
    share = metric.startswith("tasks.") or metric in ("top1_agreement", "parameters_share")
    if gate.compare == "difference":
        scale, unit = (100.0, " points") if share else (1.0, _unit(metric))
        if exact:
            return (f"{scale * value:+g}".replace("-", MINUS) if value else "0") + unit
        return signed(scale * value, 1 if share else 3) + unit
    if share:
        return f"{100 * value:g} %" if exact else f"{fixed(100 * value, 1)} %"
    if metric.endswith("_bytes"):
        return bytes_text(value)
    return f"{significant(value)}{_unit(metric)}"


def _unit(metric: str) -> str:
    units = {"_nats": " nats", "_token": " nats", "_ms": " ms", "_per_s": " tok/s"}
    return next((unit for end, unit in units.items() if metric.endswith(end)), "")
