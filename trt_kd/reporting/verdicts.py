"""How gates are decided: an estimate, its 95 % interval, and on which side of the limit it lies.

Exact numbers have an interval of zero width. Accuracies on the same items are compared with
Tango's score interval for paired proportions, agreement and KL on the same text block by block,
speeds by the t interval of the log ratio of runs of the same round. Where nothing is paired the
standard errors add as independent ones, which can only widen the interval.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from trt_kd.measuring.statistics import mean_interval, t_quantile
from trt_kd.reporting.evidence import Evidence, TimedRun
from trt_kd.reporting.gates import EXACT, QUALITY, Compare, Gate
from trt_kd.reporting.intervals import (
    Z,
    mcnemar,
    normal_interval,
    paired_difference_interval,
    paired_ratio,
    ratio_of,
    wilson_interval,
)
from trt_kd.reporting.model import GateResult, Report, Role, Variant, Verdict
from trt_kd.reporting.readings import client_text
from trt_kd.reporting.speed_model import SpeedRecord


@dataclass(frozen=True)
class Estimate:
    """A number, how sure it is, and why it may not decide anything."""

    value: float | None = None
    interval: tuple[float, float] | None = None
    method: str = ""
    p_value: float | None = None
    reason: str = ""


def decide(gate: Gate, report: Report, evidence: Evidence) -> GateResult:
    """Judge one gate; whatever is missing leaves it undecided and says so."""
    found = _estimate(gate, report, evidence)
    verdict = judge(found.interval, gate) if not found.reason else "undecided"
    reason = found.reason
    if verdict == "undecided" and not reason:
        reason = "the interval contains the limit; more items, text or repeats would decide"
    return GateResult(
        name=gate.name,
        variant=gate.variant,
        metric=_spelled(gate),
        relative_to=gate.relative_to,
        compare=gate.mode,
        bound="at most" if gate.max is not None else "at least",
        limit=gate.limit,
        value=found.value,
        interval=found.interval,
        method=found.method,
        p_value=found.p_value,
        verdict=verdict,
        reason=reason,
    )


def judge(interval: tuple[float, float] | None, gate: Gate) -> Verdict:
    """Pass if the whole ``interval`` is on the right side, fail if all on the wrong one."""
    if interval is None:
        return "undecided"
    low, high = interval
    if gate.max is not None:
        return "pass" if high <= gate.limit else "fail" if low > gate.limit else "undecided"
    return "pass" if low >= gate.limit else "fail" if high < gate.limit else "undecided"


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """Fail if any failed, else undecided if any is or there is none, else pass."""
    found = set(verdicts)
    if "fail" in found:
        return "fail"
    return "pass" if found == {"pass"} else "undecided"


def _spelled(gate: Gate) -> str:
    """The metric with its workload, as the page shows it."""
    details: list[str] = [gate.percentile] if gate.percentile else []
    details += [f"batch {gate.batch_size}"] if gate.batch_size else []
    details += [f"{gate.input_tokens} in"] if gate.input_tokens else []
    details += [f"{gate.output_tokens} out"] if gate.output_tokens else []
    return gate.metric + (f" ({', '.join(details)})" if details else "")


def _estimate(gate: Gate, report: Report, evidence: Evidence) -> Estimate:
    rows: list[Variant] = []
    for role in gate.roles:
        row = report.variant(role)
        if row is None:
            return Estimate(reason=f"the report has no variant {role!r}")
        rows.append(row)
    if gate.metric in EXACT:
        return _exact([float(getattr(row, gate.metric)) for row in rows], gate.mode)
    if gate.metric in QUALITY:
        return _quality(gate, rows, evidence)
    if gate.task is not None:
        return _accuracy(gate.task, gate.mode, rows, evidence)
    return _speed(gate, rows, report, evidence)


def _exact(values: Sequence[float], mode: Compare) -> Estimate:
    if mode == "ratio" and values[1] == 0:
        return Estimate(reason="the number compared with is zero")
    value = _combined(values, mode)
    return Estimate(value, (value, value), "exact")


def _combined(values: Sequence[float], mode: Compare) -> float:
    if mode == "value":
        return values[0]
    return values[0] / values[1] if mode == "ratio" else values[0] - values[1]


def _quality(gate: Gate, rows: list[Variant], evidence: Evidence) -> Estimate:
    metric = gate.metric
    known = [_with_stderr(row, metric) for row in rows]
    for row, each in zip(rows, known, strict=True):
        if each is None:
            return Estimate(reason=f"{metric} of {row.name} was not measured")
    pairs = [(each[0], each[1] or 0.0) for each in known if each is not None]
    if gate.mode == "ratio" and pairs[1][0] <= 0:
        return Estimate(reason=f"{metric} of {rows[1].name} is {pairs[1][0]:g}: no ratio to it")
    if len(rows) == 2 and (metric != "perplexity" or gate.mode == "ratio"):
        source = "loss_nats_per_token" if metric == "perplexity" else metric
        paired = evidence.paired_blocks(rows[0].role, rows[1].role, source)
        if paired:
            found = _paired_blocks(paired, "difference" if source != metric else gate.mode)
            return found if source == metric else _exponential(found)
    if any(each is not None and each[1] is None for each in known):
        value = _combined([pair[0] for pair in pairs], gate.mode)
        return Estimate(value, reason=f"{metric} has no standard error")
    return _independent(pairs, gate.mode)


def _with_stderr(row: Variant, metric: str) -> tuple[float, float | None] | None:
    value = getattr(row.quality, metric)
    if value is None:
        return None
    if metric == "perplexity":
        stderr = row.quality.loss_nats_per_token_stderr
        return value, None if stderr is None else value * stderr
    return value, getattr(row.quality, f"{metric}_stderr")


def _independent(pairs: list[tuple[float, float]], mode: Compare) -> Estimate:
    if mode == "value":
        value, stderr = pairs[0]
    elif mode == "ratio":
        value, stderr = ratio_of(pairs[0], pairs[1])
    else:
        value = pairs[0][0] - pairs[1][0]
        stderr = math.hypot(pairs[0][1], pairs[1][1])
    method = "normal, standard error" if mode == "value" else "normal, unpaired"
    return Estimate(value, normal_interval(value, stderr), method)


def _paired_blocks(paired: tuple[list[float], list[float]], mode: Compare) -> Estimate:
    first, second = paired
    if mode == "difference":
        changes = [a - b for a, b in zip(first, second, strict=True)]
        method = f"t, {len(first)} paired blocks"
        return Estimate(fmean(changes), mean_interval(changes), method)
    ratio, stderr = paired_ratio(first, second)
    reach = t_quantile(len(first) - 1) * stderr
    return Estimate(ratio, (ratio - reach, ratio + reach), f"t, {len(first)} paired blocks")


def _exponential(found: Estimate) -> Estimate:
    """From a difference in loss to the ratio of perplexities."""
    value, (low, high) = found.value or 0.0, found.interval or (0.0, 0.0)
    return replace(found, value=math.exp(value), interval=(math.exp(low), math.exp(high)))


def _accuracy(task: str, mode: Compare, rows: list[Variant], evidence: Evidence) -> Estimate:
    scores = [row.quality.tasks.get(task) for row in rows]
    pairs: list[tuple[float, float]] = []
    unsure = ""
    for row, score in zip(rows, scores, strict=True):
        if score is None:
            return Estimate(reason=f"{row.name} was not evaluated on {task}")
        if score.stderr is None:
            unsure = f"{task} has no standard error"
        pairs.append((score.accuracy, score.stderr or 0.0))
    if mode == "value":
        right = list(evidence.items.get(rows[0].role, {}).get(task, {}).values())
        if right and _tell_the_same(right, pairs[0][0]):
            interval = wilson_interval(sum(right), len(right))
            return Estimate(fmean(right), interval, f"Wilson, {len(right)} items")
        return replace(_independent(pairs, mode), reason=unsure)
    paired = evidence.paired_items(rows[0].role, rows[1].role, task)
    if paired and all(map(_tell_the_same, paired, [pair[0] for pair in pairs])):
        return _paired_items(paired, mode, rows[1].name)
    if mode == "ratio" and pairs[1][0] <= 0:
        return Estimate(reason=f"accuracy of {rows[1].name} is zero: no ratio to it")
    return replace(_independent(pairs, mode), reason=unsure)


def _tell_the_same(right: Sequence[int], accuracy: float) -> bool:
    """Whether right-or-wrong items are all there is: tasks with partial credit have more."""
    return math.isclose(fmean(right), accuracy, abs_tol=1e-6)


def _paired_items(paired: tuple[list[int], list[int]], mode: Compare, base: str) -> Estimate:
    first, second = paired
    n = len(first)
    gained = sum(a > b for a, b in zip(first, second, strict=True))
    lost = sum(a < b for a, b in zip(first, second, strict=True))
    p_value = mcnemar(gained, lost)
    if mode == "difference":
        interval = paired_difference_interval(gained, lost, n)
        return Estimate((gained - lost) / n, interval, f"Tango, {n} paired items", p_value)
    if not any(second):
        return Estimate(reason=f"accuracy of {base} is zero: no ratio to it")
    ratio, stderr = paired_ratio(first, second)
    method = f"normal, {n} paired items"
    return Estimate(ratio, (ratio - Z * stderr, ratio + Z * stderr), method, p_value)


def _speed(gate: Gate, rows: list[Variant], report: Report, evidence: Evidence) -> Estimate:
    records: list[SpeedRecord] = []
    runs: list[list[TimedRun]] = []
    for row in rows:
        matching = [record for record in report.speed_of(row) if _matches(gate, record)]
        if len(matching) != 1:
            many = "several workloads match; say input_tokens and output_tokens"
            reason = many if matching else f"{row.name} was not timed on this workload"
            return Estimate(reason=reason)
        records += matching
        role: Role = row.role if row.speed or row.same_speed_as is None else row.same_speed_as
        timed = evidence.runs.get(role, {}).get(matching[0].batch_size, [])
        runs.append([run for run in timed if _timed_as(run, matching[0])])
    if gate.metric == "peak_memory_bytes":
        return _memory(rows, records, gate.mode)
    values = [_recorded(record, gate) for record in records]
    if None in values:
        return Estimate(reason=f"this workload has no {gate.metric}")
    found = _from_runs(gate, runs) or _from_spread(gate, [v or 0.0 for v in values], records)
    slow = next(filter(None, map(client_text, records)), "")
    if slow:
        return replace(found, reason=slow)
    drifting = [row.name for row, each in zip(rows, records, strict=True) if each.steady is False]
    if drifting:
        return replace(found, reason=f"the repeats of {' and '.join(drifting)} were not steady")
    return found


def _timed_as(run: TimedRun, record: SpeedRecord) -> bool:
    lengths = (run.input_tokens or record.input_tokens, len(run.step_s))
    return lengths == (record.input_tokens, record.output_tokens)


def _matches(gate: Gate, record: SpeedRecord) -> bool:
    return (
        record.batch_size == (gate.batch_size or 1)
        and gate.input_tokens in (None, record.input_tokens)
        and gate.output_tokens in (None, record.output_tokens)
    )


def _memory(rows: list[Variant], records: list[SpeedRecord], mode: Compare) -> Estimate:
    for row, record in zip(rows, records, strict=True):
        if record.peak_memory_bytes is None:
            return Estimate(reason=f"peak memory of {row.name} was not recorded")
    return _exact([float(record.peak_memory_bytes or 0) for record in records], mode)


def _recorded(record: SpeedRecord, gate: Gate) -> float | None:
    if gate.metric == "output_tokens_per_s":
        return record.output_tokens_per_s
    times = getattr(record, gate.metric)
    return None if times is None else float(getattr(times, gate.percentile or "p50"))


def _from_runs(gate: Gate, runs: list[list[TimedRun]]) -> Estimate | None:
    """Judge run by run, or return None where the single runs were not kept or do not pair."""
    lengths = {len(each) for each in runs}
    if len(lengths) != 1 or lengths.pop() < 2:
        return None
    percentile = gate.percentile or "p50"
    values = [[run.metric(gate.metric, percentile) for run in each] for each in runs]
    n = len(values[0])
    if gate.mode == "difference":
        changes = [a - b for a, b in zip(values[0], values[1], strict=True)]
        return Estimate(fmean(changes), mean_interval(changes), f"t, {n} paired runs")
    logs = [math.log(value) for value in values[0]]
    if gate.mode == "ratio":
        logs = [a - math.log(b) for a, b in zip(logs, values[1], strict=True)]
    low, high = mean_interval(logs)
    method = f"t of logs, {n} paired runs" if gate.mode == "ratio" else f"t of logs, {n} runs"
    return Estimate(math.exp(fmean(logs)), (math.exp(low), math.exp(high)), method)


def _from_spread(gate: Gate, values: list[float], records: list[SpeedRecord]) -> Estimate:
    """Bounds from the half range of the throughput, where single runs were not kept."""
    ends = [
        (value * (1 - record.spread), value * (1 + record.spread))
        for value, record in zip(values, records, strict=True)
    ]
    method = "range of the repeats"
    value = _combined(values, gate.mode)
    if min(record.repeats for record in records) < 2:
        return Estimate(value, None, method, reason="a single run has no spread")
    if gate.mode == "value":
        return Estimate(value, ends[0], method)
    (low, high), (base_low, base_high) = ends
    if gate.mode == "difference":
        return Estimate(value, (low - base_high, high - base_low), method)
    if base_low <= 0:
        return Estimate(value, None, method, reason="the spread is as large as the number")
    return Estimate(value, (low / base_high, high / base_low), method)
