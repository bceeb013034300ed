"""What a distillation computes and holds, from its settings and both shapes alone."""

from typing import TYPE_CHECKING

from trt_kd.architectures.shape import ModelShape, read_shape
from trt_kd.stages.distill import DistillConfig
from trt_kd.training.features import Feature
from trt_kd.training.weights import peak

if TYPE_CHECKING:
    from trt_kd.training.on_policy import OnPolicy

PASSES = 3
"""Forward passes that cost as much as one forward and backward pass."""
DECODE_BYTES_PER_S = 1e10
"""Weights that a step of writing reads in a second: one token is bound by memory, not by FLOPs."""


def training_flops(config: DistillConfig, student: ModelShape, teacher: ModelShape) -> float:
    """Floating-point operations of all steps: text, own text, features, exits, balance, monitor."""
    step = _step_flops(config, student, teacher)
    sequences, block = config.sequences, config.data.block_tokens
    if (wanted := config.on_policy) is None:
        total = sequences * block * step
    else:
        own = _own_tokens(wanted) * (step + _judging_flops(wanted, student, teacher))
        total = sequences * ((1 - wanted.share) * block * step + wanted.share * own)
    return total + _balance_flops(config, student) + _monitor_flops(config, student, teacher)


def writing_s(
    config: DistillConfig, student: ModelShape, teacher: ModelShape, flops_per_s: float
) -> float:
    """Seconds of writing the student's own text, token by token, and of the teacher beside it."""
    wanted = config.on_policy
    if wanted is None:
        return 0.0
    policy = wanted.policy_gradient
    models = [student, teacher] if policy and policy.teacher_mix else [student]
    batches = wanted.share * config.sequences / config.batch_size
    seconds = 0.0
    for model in models:
        flops = config.batch_size * model.forward_flops_per_token()
        token_s = max(flops / flops_per_s, 4.0 * model.parameters / DECODE_BYTES_PER_S)
        seconds += batches * (wanted.prompt_tokens * flops / flops_per_s)
        seconds += batches * wanted.new_tokens * token_s
    return seconds


def training_bytes(config: DistillConfig, student: ModelShape, teacher: ModelShape) -> float:
    """Bytes of weights, gradients, optimizer state, logits, teachers, and what features keep."""
    block = config.data.block_tokens
    if config.on_policy is not None:
        block = max(block, _own_tokens(config.on_policy))
    positions = config.batch_size * block
    held = 16.0 * student.parameters
    held += 4.0 * sum(one.parameters for one in _teachers(config, teacher))
    held += 4.0 * positions * student.vocab * 2
    for feature in config.features:
        pairs, loss = _pairs(feature, student), feature.loss
        kept = 4.0 * len(loss.reads) * positions * (student.hidden + teacher.hidden)
        held += pairs * (kept + 4.0 * loss.memory_rows * teacher.hidden)
        held += pairs * 16.0 * _projector_parameters(feature, student, teacher)
    return held


def _teachers(config: DistillConfig, teacher: ModelShape) -> list[ModelShape]:
    """Sizes of the teachers that run over every token, the stage's own first."""
    if not config.uses_teacher:
        return []
    return [teacher, *map(read_shape, config.teacher.further())]


def _teaching_flops(config: DistillConfig, teacher: ModelShape) -> float:
    """Per token: one forward pass of every teacher."""
    return sum(one.forward_flops_per_token() for one in _teachers(config, teacher))


def _step_flops(config: DistillConfig, student: ModelShape, teacher: ModelShape) -> float:
    """Per token of a step: the student both ways, every teacher once, features, exits."""
    passes = PASSES + config.gradient_checkpointing
    total = passes * student.forward_flops_per_token()
    total += _teaching_flops(config, teacher)
    exits = len(config.exits.layers) if config.exits else 0
    total += exits * (PASSES + 1) * 2.0 * student.vocab * student.hidden
    for feature in config.features:
        length = config.data.block_tokens * max(student.hidden, teacher.hidden)
        compared = 2.0 * len(feature.loss.reads) * length
        projected = 2.0 * _projector_parameters(feature, student, teacher)
        share = (feature.until_step or config.steps) / config.steps
        total += PASSES * share * _pairs(feature, student) * (compared + projected)
    return total


def _own_tokens(wanted: "OnPolicy") -> int:
    """Tokens of a sequence that the student has written."""
    return wanted.prompt_tokens + wanted.new_tokens


def _judging_flops(wanted: "OnPolicy", student: ModelShape, teacher: ModelShape) -> float:
    """Per token: the pass of both heads that a policy gradient makes before its own."""
    if wanted.policy_gradient is None:
        return 0.0
    return 2.0 * (student.vocab * student.hidden + teacher.vocab * teacher.hidden)


def _balance_flops(config: DistillConfig, student: ModelShape) -> float:
    """One pass's backward way for every term, at every measurement of the norms."""
    if config.balance is None:
        return 0.0
    heads = (peak(config.task_weight), peak(config.response_weight))
    terms = sum(map(bool, heads)) + sum(_pairs(one, student) for one in config.features)
    terms += len(config.exits.layers) if config.exits else 0
    measured = -(-config.steps // config.balance.every_steps)
    tokens = config.batch_size * config.data.block_tokens
    return measured * terms * tokens * (PASSES - 1) * student.forward_flops_per_token()


def _monitor_flops(config: DistillConfig, student: ModelShape, teacher: ModelShape) -> float:
    """The student on held-out text at every measurement, every teacher once."""
    if (monitor := config.monitor) is None:
        return 0.0
    measured = 2 + (config.steps - 1) // monitor.every_steps
    tokens = monitor.blocks * config.data.block_tokens
    once = _teaching_flops(config, teacher)
    return tokens * (measured * student.forward_flops_per_token() + once)


def _pairs(feature: Feature, student: ModelShape) -> int:
    if isinstance(feature.pairs, list):
        return len(feature.pairs)
    return len(feature.layers(student.layers))


def _projector_parameters(feature: Feature, student: ModelShape, teacher: ModelShape) -> int:
    """An estimate: one matrix between both widths, two of an MLP."""
    matrices = {"none": 0, "mlp": 2}.get(feature.projector.kind, 1)
    return matrices * student.hidden * teacher.hidden
