"""What a step will cost, from closed forms: FLOPs, bytes and this machine's measured matrix rate.

The constants are shares of that rate seen in practice on CPUs (see docs/estimates.md): with them a
plan is within a factor of two of the committed records, which tells an evening from a month.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_kd.architectures.shape import ModelShape
from trt_kd.measuring.roofline import matrix_flops_per_s
from trt_kd.pipeline.flow import Step
from trt_kd.pipeline.pruning_cost import fold_flops, proof_tokens
from trt_kd.pipeline.training_cost import training_bytes, training_flops, writing_s
from trt_kd.stages.prune import PruneConfig

FORWARD_SHARE = 0.55
"""Share of the float32 matrix rate that a forward pass reaches."""
TRAINING_SHARE = 1.0
"""The same of a bfloat16 training step, whose matrix products are faster than float32 ones."""
BASE_MEMORY_BYTES = 700_000_000
"""A Python process with torch loaded."""
TOKENS_PER_ITEM = 60
"""Tokens behind one item of our own tasks, shared prefixes read once."""
START_S = 4.0
"""Loading libraries and a model."""


@dataclass(frozen=True)
class Shapes:
    """Sizes of both models; None where they cannot be told before import."""

    teacher: ModelShape | None
    student: ModelShape | None


@dataclass(frozen=True)
class Estimate:
    """Cost of one step on this machine; None where the model's sizes are not known yet."""

    time_s: float | None
    memory_bytes: float | None
    disk_bytes: float | None


def estimate(step: Step, shapes: Shapes) -> Estimate:
    """Estimate ``step``; see the module for what is behind the numbers."""
    if shapes.teacher is None or shapes.student is None:
        return Estimate(None, None, None)
    reads = set(step.inputs.values()) | {step.name}
    student = any(name.startswith(("student", "pruned", "cross_entropy")) for name in reads)
    model = shapes.student if student else shapes.teacher
    time_s, memory, disk = _COSTS[step.stage](step.config, model, shapes.teacher)
    return Estimate(START_S + time_s, BASE_MEMORY_BYTES + memory, disk)


def forward_s(model: ModelShape, tokens: float) -> float:
    """Seconds of a float32 forward pass over ``tokens`` on this machine."""
    return tokens * model.forward_flops_per_token() / (FORWARD_SHARE * matrix_flops_per_s())


def free_bytes(path: Path) -> int:
    """Free disk space at the nearest existing parent of ``path``."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


Cost = tuple[float, float, float]


def _import(config: Any, model: ModelShape, teacher: ModelShape) -> Cost:
    size = model.parameters
    return size / 2e7, 4.0 * size, 2.0 * size


def _cut_s(config: PruneConfig, teacher: ModelShape, dropped: int) -> float:
    """Seconds of one cut that is scored and refit, with folds where it drops layers."""
    tokens = config.calibration_tokens
    if not config.reconstruct:
        return forward_s(teacher, tokens)
    sequential = config.reconstruct.schedule == "sequential"
    gram_flops = 2.0 * tokens * teacher.layers * teacher.ffn**2
    read = (5 if sequential else 1) * tokens + proof_tokens(config, teacher, dropped)
    fit_flops = gram_flops + fold_flops(config, teacher, dropped)
    return forward_s(teacher, read) + fit_flops / matrix_flops_per_s()


def _score(config: Any, model: ModelShape, teacher: ModelShape) -> Cost:
    seconds = forward_s(teacher, config.calibration_tokens + config.check_tokens)
    for axis, size in config.cuts(teacher):
        cut = config.cut(axis, size)
        seconds += START_S + forward_s(teacher, config.check_tokens)
        seconds += _cut_s(cut, teacher, teacher.layers - cut.planned(teacher).layers)
    return seconds, float(config.memory_bytes(teacher)), 8.0 * teacher.layers * teacher.ffn


def _latency(config: Any, model: ModelShape, teacher: ModelShape) -> Cost:
    models = len(config.lanes) * (config.probes + -(-config.probes // config.together))
    runs, _, _ = _benchmark(config.benchmark(0), teacher, teacher)
    made_s = 3 * START_S + forward_s(teacher, config.data.block_tokens)
    return models * (made_s + runs / 4), 8.0 * config.together * teacher.parameters, 2e9


def _prune(config: Any, model: ModelShape, teacher: ModelShape) -> Cost:
    dropped = -(-max(0, teacher.layers - model.layers) // config.rounds)
    seconds = config.rounds * _cut_s(config, teacher, dropped)
    disk = 2.0 * model.parameters
    if config.searching:
        check_s = START_S + forward_s(teacher, config.searching.check_tokens)
        seconds = config.searching.top_k * (seconds + check_s)
        disk *= 1 + config.searching.top_k
        if config.searching.tournament:
            trained = config.searching.tournament.trained_sequences() * config.data.block_tokens
            seconds += (
                trained
                * 3
                * model.forward_flops_per_token()
                / (TRAINING_SHARE * matrix_flops_per_s())
            )
            disk += 12.0 * model.parameters
    return seconds, float(config.memory_bytes(teacher)), disk


def _distill(config: Any, model: ModelShape, teacher: ModelShape) -> Cost:
    rate = matrix_flops_per_s()
    seconds = training_flops(config, model, teacher) / (TRAINING_SHARE * rate)
    seconds += writing_s(config, model, teacher, FORWARD_SHARE * rate)
    memory = training_bytes(config, model, teacher)
    return seconds, memory, 2.0 * model.parameters + 12.0 * model.parameters


def _quantize(config: Any, model: ModelShape, teacher: ModelShape) -> Cost:
    cost = (
        forward_s(model, 2 * config.calibration_tokens),
        6.0 * model.parameters,
        2.0 * model.parameters,
    )
    if config.train is None:
        return cost
    seconds, memory, disk = _distill(config.train, model, model)
    return cost[0] + seconds, max(cost[1], memory), cost[2] + disk


def _export(config: Any, model: ModelShape, teacher: ModelShape) -> Cost:
    tokens = 2 * config.verify_blocks * config.data.block_tokens
    seconds = 8.0 + forward_s(model, tokens)
    return seconds, 10.0 * model.parameters, 4.0 * model.parameters


def _evaluate(config: Any, model: ModelShape, teacher: ModelShape) -> Cost:
    tokens = 2 * config.blocks * config.data.block_tokens
    tokens += config.items * len(config.tasks) * TOKENS_PER_ITEM
    return forward_s(model, tokens), 4.0 * (model.parameters + teacher.parameters), 1e5


def _benchmark(config: Any, model: ModelShape, teacher: ModelShape) -> Cost:
    rounds = config.warmup + config.repeats
    seconds = 0.0
    for workload in config.rounds.workloads:
        batch = workload.batch_size
        prefill = forward_s(model, batch * workload.input_tokens)
        step_s = max(forward_s(model, batch), 4.0 * model.parameters / 1e10)
        decode = workload.output_tokens * step_s
        seconds += 4 * rounds * (prefill + decode)
    return seconds, 12.0 * teacher.parameters, 1e6


def _report(config: Any, model: ModelShape, teacher: ModelShape) -> Cost:
    return 2.0, 0.0, 1e6


_COSTS: dict[str, Callable[[Any, ModelShape, ModelShape], Cost]] = {
    "import": _import,
    "score": _score,
    "latency": _latency,
    "prune": _prune,
    "distill": _distill,
    "quantize": _quantize,
    "export": _export,
    "evaluate": _evaluate,
    "benchmark": _benchmark,
    "report": _report,
}
