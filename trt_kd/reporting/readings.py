"""What the tables, figures and cards read from a report."""

import math
from dataclasses import dataclass

from trt_kd.backends.load import LEAST_HEADROOM
from trt_kd.reporting.formatting import TIMES, bytes_text, fixed, percent_change, times
from trt_kd.reporting.model import Report, Variant
from trt_kd.reporting.speed_model import LoadRecord, SpeedRecord


def hardware(report: Report) -> str:
    """The machine in one line."""
    facts = report.environment
    memory = facts.get("memory_bytes")
    parts = [
        str(facts.get("gpu") or ""),
        str(facts.get("processor") or ""),
        f"{facts['cores']} cores" if facts.get("cores") else "",
        bytes_text(memory) if isinstance(memory, int | float) else "",
        str(facts.get("system") or ""),
    ]
    return ", ".join(part for part in parts if part)


def first_workload(report: Report) -> SpeedRecord | None:
    """The baseline's smallest batch, or the first timed one."""
    records = report.variants[0].speed or [r for v in report.variants for r in v.speed]
    return min(records, key=lambda record: record.batch_size) if records else None


def load_of(record: SpeedRecord) -> str:
    """``batch 8``, or ``8 in flight`` where a load generator measured."""
    size = record.batch_size
    return f"{size} in flight" if record.under_load else f"batch {size}"


def load_text(record: LoadRecord) -> str:
    """``8 in flight`` or ``2 requests/s``."""
    if record.concurrency is None:
        return f"{record.request_rate or 0:g} requests/s"
    return f"{record.concurrency} in flight"


def client_text(record: LoadRecord | SpeedRecord) -> str:
    """What a reader must know of the client, or nothing."""
    headroom = record.client_headroom
    if headroom is None or headroom >= LEAST_HEADROOM:
        return ""
    return f"the client alone is only {headroom:.1f}{TIMES} as fast"


def matching(report: Report, variant: Variant, workload: SpeedRecord) -> SpeedRecord | None:
    """The record of ``variant`` with the same batch size and lengths."""
    wanted = (workload.batch_size, workload.input_tokens, workload.output_tokens)
    for record in report.speed_of(variant):
        if (record.batch_size, record.input_tokens, record.output_tokens) == wanted:
            return record
    return None


def task_names(report: Report) -> list[str]:
    """Every task that any variant was evaluated on, in order of appearance."""
    return list(dict.fromkeys(name for v in report.variants for name in v.quality.tasks))


def mean_accuracy(variant: Variant) -> float | None:
    """Plain mean of the accuracies, or None without tasks."""
    scores = variant.quality.tasks.values()
    return sum(score.accuracy for score in scores) / len(scores) if scores else None


def mean_accuracy_stderr(variant: Variant) -> float | None:
    """Its standard error, tasks taken as independent."""
    errors = [score.stderr for score in variant.quality.tasks.values()]
    known = [error for error in errors if error is not None]
    if not known or len(known) < len(errors):
        return None
    return math.sqrt(sum(error**2 for error in known)) / len(known)


def perplexity_stderr(variant: Variant) -> float | None:
    """Standard error of the perplexity, from the loss it is the exponential of."""
    stderr = variant.quality.loss_nats_per_token_stderr
    perplexity = variant.quality.perplexity
    return None if stderr is None or perplexity is None else perplexity * stderr


def verdict_sentence(report: Report) -> str:
    """The verdict in one line."""
    count = len(report.gates)
    if not count:
        return "The recipe names no gates, so nothing decides."
    found = [gate.verdict for gate in report.gates]
    if report.verdict == "pass":
        return "The only gate holds." if count == 1 else f"All {count} gates hold."
    number = found.count(report.verdict)
    does = "does not hold" if number == 1 else "do not hold"
    if report.verdict == "undecided":
        does = "cannot be decided"
    return f"{number} of {count} gates {does}." if count > 1 else f"The only gate {does}."


@dataclass(frozen=True)
class Headline:
    """What ships, in four numbers; each stands in the tables too."""

    name: str
    figures: list[tuple[str, str, str]]
    """(label, value, against what)."""


def headline(report: Report) -> Headline | None:
    """The smallest student against the baseline, or None where there is no student."""
    variant = report.variant("student_quantized") or report.variant("student")
    base = report.variants[0]
    if variant is None or variant is base:
        return None
    against = f"against {base.name}"
    found = [
        ("Parameters", percent_change(variant.parameters, base.parameters), against),
        ("Size", percent_change(variant.size_bytes, base.size_bytes), against),
    ]
    workload = first_workload(report)
    fast = matching(report, variant, workload) if workload else None
    slow = matching(report, base, workload) if workload else None
    if fast and slow:
        ratio = fast.output_tokens_per_s / slow.output_tokens_per_s
        found.append(("Throughput", times(ratio), f"{against}, {load_of(fast)}"))
    if variant.quality.top1_agreement is not None:
        share = f"{fixed(100 * variant.quality.top1_agreement, 1)} %"
        found.append(("Top-1 agreement", share, "with the teacher, held-out text"))
    return Headline(variant.name, found)
