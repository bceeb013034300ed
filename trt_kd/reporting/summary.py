"""The comparison for a terminal, at most 110 columns wide."""

from collections.abc import Callable

from trt_kd.reporting.formatting import MISSING, bytes_text, fixed, significant, times
from trt_kd.reporting.model import Report, Variant
from trt_kd.reporting.readings import (
    first_workload,
    load_of,
    matching,
    mean_accuracy,
    verdict_sentence,
)

WIDTH = 110
NAME_WIDTH = 26
MARKS = {"pass": "pass", "fail": "FAIL", "undecided": "?"}


def console_table(report: Report) -> str:
    """Rows, gates and verdict as aligned plain text; the first row is the baseline."""
    columns = _columns(report)
    lines = [["", *(title for title, _ in columns)]]
    for variant in report.variants:
        name = variant.name + (" (baseline)" if variant is report.variants[0] else "")
        lines.append([_cut(name, NAME_WIDTH), *(show(variant) for _, show in columns)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
    text = [_aligned(line, widths) for line in lines]
    workload = first_workload(report)
    if workload:
        text.append(
            f"Speed: {load_of(workload)}, {workload.input_tokens} + "
            f"{workload.output_tokens} tokens, {workload.repeats} interleaved runs."
        )
    text.append("")
    text += [f"{MARKS[gate.verdict]:>4}  {gate.name}" for gate in report.gates]
    text.append(f"Verdict: {report.verdict}. {verdict_sentence(report)}")
    text += [f"Note: {note}" for note in report.notes]
    return "\n".join(_cut(line.replace("\n", " "), WIDTH).rstrip() for line in text)


def _columns(report: Report) -> list[tuple[str, Callable[[Variant], str]]]:
    workload = first_workload(report)
    base = report.variants[0]

    def itl(variant: Variant) -> str:
        record = matching(report, variant, workload) if workload else None
        return significant(record.itl_ms.p50) if record and record.itl_ms else MISSING

    def rate(variant: Variant) -> str:
        record = matching(report, variant, workload) if workload else None
        return significant(record.output_tokens_per_s) if record else MISSING

    def speed_up(variant: Variant) -> str:
        record = matching(report, variant, workload) if workload else None
        start = matching(report, base, workload) if workload else None
        if not record or not start:
            return MISSING
        return times(record.output_tokens_per_s / start.output_tokens_per_s)

    return [
        ("params", lambda v: f"{significant(v.parameters / 1e6, 4)} M"),
        ("kept", lambda v: f"{fixed(100 * v.parameters_share, 1)} %"),
        ("size", lambda v: bytes_text(v.size_bytes)),
        ("KL nats", lambda v: _number(v.quality.kl_to_teacher_nats, 3)),
        ("agree %", lambda v: _number(v.quality.top1_agreement, 1, 100)),
        ("ppl", lambda v: _number(v.quality.perplexity, 1)),
        ("tasks %", lambda v: _number(mean_accuracy(v), 1, 100)),
        ("ITL ms", itl),
        ("tok/s", rate),
        ("speed-up", speed_up),
    ]


def _number(value: float | None, digits: int, scale: float = 1.0) -> str:
    return MISSING if value is None else fixed(scale * value, digits)


def _aligned(line: list[str], widths: list[int]) -> str:
    first = line[0].ljust(widths[0])
    rest = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
    return "  ".join([first, *rest])


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "\u2026"
