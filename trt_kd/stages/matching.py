"""What distillation is given fits together: settings, teacher, student and processes."""

from pathlib import Path
from typing import TYPE_CHECKING

from trt_kd.architectures.shape import read_shape
from trt_kd.artifacts.manifest import sha256_of
from trt_kd.errors import ConfigError, ModelError
from trt_kd.evaluation.vocabulary import check_padding, context_tokens, tokenizer_identity
from trt_kd.losses.kl import ReverseKL
from trt_kd.training.weights import peak, weight_at

if TYPE_CHECKING:
    from trt_kd.stages.distill import DistillConfig
    from trt_kd.training.escalation import Escalation
    from trt_kd.training.on_policy import OnPolicy


def check_teacher(config: "DistillConfig", *, has_teacher: bool) -> None:
    """Check that a teacher's checkpoint is given if and only if the objective uses one.

    Raises:
        ConfigError: if it is not so.
    """
    needs = config.uses_teacher and config.teacher.needs_checkpoint
    if has_teacher and config.uses_teacher and not needs:
        raise ConfigError(
            f"teacher {config.teacher.kind} reads no checkpoint: the one given has no effect",
            hint="leave it out, or choose another kind of teacher",
        )
    if needs and not has_teacher:
        weight = peak(config.response_weight)
        what = f"response_weight {weight:g} needs" if weight else "features need"
        raise ConfigError(
            f"{what} a teacher and none is given",
            hint="give one, or set response_weight=0 and task_weight=1, without features",
        )
    if has_teacher and not config.uses_teacher:
        raise ConfigError(
            "a teacher is given and response_weight is 0: it would have no effect",
            hint="leave the teacher out or raise response_weight",
        )


def check_pair(*, student: Path, teacher: Path) -> None:
    """Check, from small files alone, that both models speak of the same tokens.

    Vocabularies may differ in padding: rows of the output head that no token of the tokenizer uses.

    Raises:
        ModelError: if tokenizers differ, or a vocabulary lacks a token of the tokenizer.
    """
    vocabularies = {"student": read_shape(student).vocab, "teacher": read_shape(teacher).vocab}
    check_padding(**vocabularies, tokenizer=student)
    if _digest(student / "tokenizer.json") != _digest(teacher / "tokenizer.json"):
        other = tokenizer_identity(student) != tokenizer_identity(teacher)
        raise ModelError(
            f"tokenizer.json of {student} and {teacher} differ",
            hint="token distillation needs one tokenizer: prune the student from this teacher"
            + (", or set teacher=cross_tokenizer loss=uld" if other else ""),
        )


def check_other_tokenizer(*, student: Path, teacher: Path) -> None:
    """Check that a teacher which is said to have another tokenizer does have one.

    Raises:
        ModelError: if it has the student's, or one is missing.
    """
    if tokenizer_identity(student) == tokenizer_identity(teacher):
        raise ModelError(
            f"{student} and {teacher} have one tokenizer",
            hint="write teacher: online and a loss that compares token with token",
        )


def check_sizes(config: "DistillConfig", *, student: Path, teacher: Path) -> None:
    """Check that the teacher is no smaller than the student, unless the settings allow it.

    One of equal size is welcome: the student's own earlier self (arXiv:1805.04770).

    Raises:
        ModelError: if it is smaller: most often the two were given the wrong way round.
    """
    small, large = read_shape(student).parameters, read_shape(teacher).parameters
    if small > large and not config.allow_smaller_teacher:
        raise ModelError(
            f"the teacher has {large:,} parameters, fewer than the student's {small:,}",
            hint="give them the other way round, or set allow_smaller_teacher=true",
        )


def option_problem(config: "DistillConfig") -> str | None:
    """Why an option makes no sense beside the others; None where all do."""
    found: dict[str, str | None] = {
        "on_policy": _on_policy_problem(config, config.on_policy) if config.on_policy else None,
        "features_if": _escalation_problem(config, config.features_if)
        if config.features_if
        else None,
        "exits": f"an exit's head is read whole: write sharding: none, not {config.sharding}"
        if config.exits and config.sharding != "none"
        else None,
        "balance": _balance_problem(config) if config.balance else None,
        "two_tasks": _two_tasks_problem(config) if config.two_tasks else None,
    }
    return next((f"{name}: {problem}" for name, problem in found.items() if problem), None)


def _on_policy_problem(config: "DistillConfig", wanted: "OnPolicy") -> str | None:
    drawn = [step for step in range(config.steps) if wanted.draws(step, config.seed)]
    weights = (weight_at(config.response_weight, step, config.steps) for step in drawn)
    teacher, block = config.teacher, config.data.block_tokens
    policy = wanted.policy_gradient
    problems = {
        "response_weight is 0: only a teacher can judge what the student writes": not peak(
            config.response_weight
        ),
        f"a {teacher.kind} teacher has not read what the student will write: write teacher: "
        "online": not teacher.runs_beside,
        f"{config.loss.kind} needs the true next tokens, which the student's own text has not: "
        "take another loss": config.loss.needs_labels and not policy,
        f"policy_gradient takes one teacher in every step, not {teacher.kind}: write teacher: "
        "online": policy is not None and teacher.kind != "online",
        "policy_gradient takes the place of the loss in every step, and it is the reverse KL: "
        "write loss: reverse_kl": policy is not None
        and wanted.share == 1
        and config.loss != ReverseKL(),
        "the student continues a block as one text: leave packing.reset out": config.packing.reset,
        f"the student cannot write while it is sharded: write sharding: none, not "
        f"{config.sharding}": config.sharding != "none",
        f"prompt_tokens {wanted.prompt_tokens} must be at most data.block_tokens {block}": (
            wanted.prompt_tokens > block
        ),
        f"no effect: share {wanted.share:g} draws none of {config.steps} steps with seed "
        f"{config.seed}": not drawn,
        "response_weight is 0 at a step at which the student writes: nothing to learn": not all(
            weights
        ),
        "task_weight has no effect: share 1 leaves no step with true tokens": wanted.share == 1
        and peak(config.task_weight) > 0,
    }
    return next((problem for problem, found in problems.items() if found), None)


def _escalation_problem(config: "DistillConfig", wanted: "Escalation") -> str | None:
    after, monitor = wanted.after_steps, config.monitor
    problems = {
        "no effect: there are no features": not config.features,
        "response_weight is 0: there is no gap to the teacher to close first": not peak(
            config.response_weight
        ),
        f"after_steps {after} must be below steps {config.steps}": after >= config.steps,
        "the gap is measured by the monitor: leave monitor: null out": monitor is None,
        f"step {after} is not measured: make after_steps a multiple of monitor.every_steps": (
            monitor is not None and not monitor.due(after, config.steps)
        ),
        "a feature that is learnt alone begins at once: leave alone out": any(
            feature.alone for feature in config.features
        ),
        f"a feature ends before step {after}: leave until_step out": any(
            feature.until_step is not None and feature.until_step <= after
            for feature in config.features
        ),
    }
    return next((problem for problem, found in problems.items() if found), None)


def _balance_problem(config: "DistillConfig") -> str | None:
    heads = [weight for weight in (config.task_weight, config.response_weight) if peak(weight)]
    terms = len(heads) + len(config.features) + len(config.exits.layers if config.exits else [])
    problems = {
        "no effect: there is a single term": terms < 2,
        "the student's own text has gradients of another size: leave one of them out": (
            config.on_policy is not None
        ),
        f"the norms are measured in a whole model: write sharding: none, not {config.sharding}": (
            config.sharding != "none"
        ),
        "the norms are measured between layers that are kept: leave gradient_checkpointing out": (
            config.gradient_checkpointing
        ),
    }
    return next((problem for problem, found in problems.items() if found), None)


def _two_tasks_problem(config: "DistillConfig") -> str | None:
    sequences = config.batch_size * config.gradient_accumulation
    source, teacher = config.data.source, config.teacher
    problems = {
        f"{source.kind} text has no traces: write data.source: {{kind: generated, artifact: "
        "FOLDER}": not source.holds_traces,
        "no effect: task_weight is 0": not peak(config.task_weight),
        f"a step of {sequences} sequences does not hold both tasks of every trace: make batch_size "
        "times gradient_accumulation even": sequences % 2 == 1,
        f"a {teacher.kind} teacher reads plain text, not examples: write teacher: online": (
            config.uses_teacher and not (teacher.same_tokens and teacher.needs_checkpoint)
        ),
        "an example has a block of its own: leave packing.reset out": config.packing.reset,
        "features compare whole blocks: leave one of them out": bool(config.features),
        "the student continues plain text: leave on_policy out": config.on_policy is not None,
    }
    return next((problem for problem, found in problems.items() if found), None)


def check_context(config: "DistillConfig", *, student: Path, teacher: Path) -> None:
    """Check that prompts and what the student adds fit into both models.

    Raises:
        ConfigError: if they do not.
    """
    wanted = config.on_policy
    limit = min(context_tokens(student), context_tokens(teacher))
    if wanted is not None and wanted.prompt_tokens + wanted.new_tokens > limit:
        raise ConfigError(
            f"on_policy: prompt_tokens {wanted.prompt_tokens} and new_tokens {wanted.new_tokens} "
            f"are more than the context of {limit} tokens",
            hint="lower one of them",
        )


def check_processes(config: "DistillConfig", count: int) -> None:
    """Check that so many processes can share the run.

    Raises:
        ConfigError: if they cannot.
    """
    config.passes(count)
    if count > 1 and config.uses_teacher and not config.teacher.needs_checkpoint:
        raise ConfigError(
            f"teacher {config.teacher.kind} works in one process, {count} were started",
            hint="start it without a launcher, or take teacher online or cached",
        )


def _digest(path: Path) -> str:
    if not path.is_file():
        raise ModelError(f"{path} is missing", hint="import the model again from its source")
    return sha256_of(path)
