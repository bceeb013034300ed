"""Train a pruned student: imitate the teacher, or hard labels alone as the control."""

import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, model_validator
from typing_extensions import Self

from trt_kd.architectures.shape import read_shape
from trt_kd.artifacts import Artifact, work_directory, work_key
from trt_kd.checkpoints import load_model, load_tokenizer, save_model, stored_dtype
from trt_kd.config import StageConfig, plugin_field
from trt_kd.data.base import DataConfig, fingerprint, token_blocks
from trt_kd.losses import LOSSES
from trt_kd.losses.base import KDLoss
from trt_kd.losses.kl import ForwardKL
from trt_kd.optional import require
from trt_kd.seeding import seed_everything
from trt_kd.stages.matching import (
    check_context,
    check_other_tokenizer,
    check_pair,
    check_processes,
    check_sizes,
    check_teacher,
    option_problem,
)
from trt_kd.stages.teaching import train_in
from trt_kd.teachers import TEACHERS
from trt_kd.teachers.base import Teacher
from trt_kd.teachers.online import OnlineTeacher
from trt_kd.training.alarms import ALARMS, Need
from trt_kd.training.checkpointing import check_space, claim
from trt_kd.training.distributed import joined, writing_once
from trt_kd.training.features import with_pairs
from trt_kd.training.history import training_metrics, write_rows
from trt_kd.training.monitors import MonitorConfig
from trt_kd.training.packing import Packing
from trt_kd.training.run import Run, Text
from trt_kd.training.schedule import Schedule
from trt_kd.training.two_tasks import TwoTasks
from trt_kd.training.weights import (
    Weight,
    WeightSchedule,
    over_whole_run,
    peak,
    step_without_term,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class DistillConfig(Schedule, StageConfig):
    """What the student learns from, on how many tokens, and how fast."""

    stage: ClassVar[str] = "distill"

    loss: plugin_field(LOSSES, KDLoss) = ForwardKL()  # type: ignore[valid-type]
    """How far student and teacher are apart; without effect where ``response_weight`` is 0."""
    response_weight: Weight = 1.0
    """Weight of the loss against the teacher, or its schedule; 0 trains without one."""
    task_weight: Weight = 0.0
    """Weight of cross-entropy with the text itself, or its schedule; it pulls towards narrow
    text."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the label's mass that cross-entropy spreads over the vocabulary."""
    teacher: plugin_field(TEACHERS, Teacher) = OnlineTeacher()  # type: ignore[valid-type]
    """How the teacher's logits are had."""
    allow_smaller_teacher: bool = False
    """Let a teacher of fewer parameters than the student teach; by default that is a mix-up."""
    data: DataConfig = DataConfig()
    """Training text; blocks are read in order, each once."""
    packing: Packing = Packing()
    """How documents that share a block see each other."""
    two_tasks: TwoTasks | None = None
    """Learn from traces as two tasks, a block for each answer and each rationale; as plain text if
    left out."""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        step = step_without_term([self.task_weight, self.response_weight], self.steps)
        if step is not None:
            raise ValueError(
                f"task_weight and response_weight are both 0 at step {step + 1}: nothing to learn"
            )
        if self.label_smoothing and not peak(self.task_weight):
            raise ValueError("label_smoothing has no effect: task_weight is 0")
        if self.allow_smaller_teacher and not self.uses_teacher:
            raise ValueError("allow_smaller_teacher has no effect: response_weight is 0")
        return self

    @model_validator(mode="after")
    def _weights_arrive_in_time(self) -> Self:
        weights = {"task_weight": self.task_weight, "response_weight": self.response_weight}
        weights |= {"exits.weight": self.exits.weight} if self.exits else {}
        weights |= {f"features.{n}.weight": one.weight for n, one in enumerate(self.features)}
        for name, weight in weights.items():
            if isinstance(weight, WeightSchedule) and (weight.steps or 0) > self.steps:
                raise ValueError(
                    f"{name}.steps {weight.steps} must be at most steps {self.steps}; "
                    "write share: 1.0 for the whole run"
                )
        return self

    @model_validator(mode="after")
    def _features_can_be_read(self) -> Self:
        if self.features and not self.teacher.shows_layers:
            raise ValueError(
                f"features need a teacher that runs beside the student; a {self.teacher.kind} one "
                "has no layers to read: write teacher: online"
            )
        for number, feature in enumerate(self.features):
            if (feature.until_step or 0) >= self.steps:
                raise ValueError(
                    f"features.{number}.until_step {feature.until_step} must be below steps "
                    f"{self.steps}: leave it out"
                )
        return self

    @model_validator(mode="after")
    def _alarms_can_be_raised(self) -> Self:
        for alarm in ALARMS:
            missing = " and no ".join(sorted(alarm.needs - self.has))
            if alarm.name in self.stop_on and missing:
                raise ValueError(f"stop_on: {alarm.name} has no effect: the run has no {missing}")
        return self

    @model_validator(mode="after")
    def _teacher_gives_what_the_loss_needs(self) -> Self:
        problem = self.teacher.problem(self.loss) if peak(self.response_weight) else None
        if problem:
            losses = [LOSSES.load(name)(kind=name) for name in LOSSES.names()]
            choices = [loss.kind for loss in losses if self.teacher.problem(loss) is None]
            raise ValueError(
                f"teacher {self.teacher.kind}: {problem}; choices at their defaults: "
                f"{', '.join(choices)}; any with teacher online"
            )
        return self

    @model_validator(mode="after")
    def _documents_are_told_apart_everywhere(self) -> Self:
        if self.packing.reset and self.uses_teacher and not self.teacher.runs_beside:
            raise ValueError(
                "packing.reset needs teacher online or several: "
                f"{self.teacher.kind} reads a block as one text"
            )
        if self.packing.reset and self.features:
            raise ValueError("packing.reset: features compare whole blocks: leave one of them out")
        return self

    @model_validator(mode="after")
    def _teachers_can_be_sharded(self) -> Self:
        kinds = ("several", "cross_tokenizer")
        if self.sharding != "none" and self.uses_teacher and self.teacher.kind in kinds:
            raise ValueError(
                f"sharding {self.sharding} takes one teacher, not {self.teacher.kind}: write "
                "sharding: none"
            )
        return self

    @model_validator(mode="after")
    def _options_fit_together(self) -> Self:
        if problem := option_problem(self):
            raise ValueError(problem)
        return self

    @property
    def uses_teacher(self) -> bool:
        """Whether any step compares the student with a teacher, at its logits or inside."""
        return peak(self.response_weight) > 0 or bool(self.features)

    @property
    def has(self) -> frozenset[Need]:
        """What the run logs beside its loss."""
        found: dict[Need, bool] = {
            "monitor": self.monitor is not None,
            "response": peak(self.response_weight) > 0,
            "features": bool(self.features),
            "on_policy": self.on_policy is not None,
            "common_tokenizer": self.teacher.same_tokens,
        }
        return frozenset(need for need, there in found.items() if there)

    @property
    def tokens(self) -> int:
        """Tokens that the run reads."""
        return self.sequences * self.data.block_tokens

    def outside(self) -> dict[str, str]:
        """Fingerprints of the training text and of what the teacher reads."""
        if self.two_tasks is not None:
            self.two_tasks.check(self.data)
        return {**self.data.outside(), **self.teacher.outside()}

    def rehearsal(self) -> Self:
        """Two steps of one sequence, a checkpoint after each."""
        return self.model_copy(
            update={
                "steps": 2,
                "batch_size": 1,
                "gradient_accumulation": 2 if self.two_tasks else 1,
                "warmup_steps": min(self.warmup_steps, 1),
                "checkpoint_every_steps": 1,
                "teacher": self.teacher.rehearsal(),
                "task_weight": over_whole_run(self.task_weight),
                "response_weight": over_whole_run(self.response_weight),
                "monitor": self.monitor and MonitorConfig(every_steps=1, blocks=1, skip_blocks=0),
                "features": [feature.rehearsal() for feature in self.features],
                "features_if": None,
                "exits": self.exits and self.exits.rehearsal(),
                "balance": self.balance and self.balance.model_copy(update={"every_steps": 1}),
                "on_policy": self.on_policy and self.on_policy.rehearsal(),
                "stop_on": [],
            }
        )

    def cross_entropy(self) -> Self:
        """The control: the same tokens and steps on hard labels alone, without a teacher."""
        plain = self.has & {"monitor"}
        return self.model_copy(
            update={
                "task_weight": 1.0,
                "response_weight": 0.0,
                "label_smoothing": 0.0,
                "loss": ForwardKL(),
                "teacher": OnlineTeacher(),
                "allow_smaller_teacher": False,
                "features": [],
                "features_if": None,
                "exits": None,
                "balance": None,
                "on_policy": None,
                "stop_on": [a.name for a in ALARMS if a.name in self.stop_on and a.needs <= plain],
            }
        )


def distill(
    config: DistillConfig, *, student: Artifact, teacher: Artifact | None = None, out: Path
) -> Artifact:
    """Train checkpoint ``student`` and write it, in its own dtype, to ``out``.

    Goes on from its last training checkpoint if an earlier run with the same settings was cut off.

    Raises:
        ConfigError: if a teacher is missing, or given and not used, or the processes of a launcher
            cannot share the run.
        ModelError: if teacher and student do not share vocabulary and tokenizer, or the teacher is
            the smaller one.
        DataError: if the text is too short for the steps.
        TrtKdError: if the loss stops being finite.
    """
    check_teacher(config, has_teacher=teacher is not None)
    if config.exits is not None:
        config.exits.check(read_shape(student.path).layers)
    training = config
    if teacher is not None:
        for path in (teacher.path, *config.teacher.further()):
            if config.teacher.same_tokens:
                check_pair(student=student.path, teacher=path)
            else:
                check_other_tokenizer(student=student.path, teacher=path)
        check_sizes(config, student=student.path, teacher=teacher.path)
        check_context(config, student=student.path, teacher=teacher.path)
        training = _with_pairs(config, student, teacher)
    require_modelopt()
    inputs = {"student": student} | ({"teacher": teacher} if teacher is not None else {})
    with joined() as processes, writing_once(processes, out, config, inputs) as draft:
        check_processes(config, processes.count)
        work = work_directory(out)
        tokenizer = load_tokenizer(student.path)
        with processes.main_first():
            text = text_of(config, tokenizer)
            if processes.main:
                check_space(out.parent, read_shape(student.path).parameters)
                keys = {role: artifact.key for role, artifact in inputs.items()}
                claim(work, work_key(config, keys))
        seed_everything(config.seed)
        model = load_model(student.path, dtype="float32")
        asked = teacher or (student if config.uses_teacher else None)
        end = tokenizer.eos_token_id if config.packing.reset else None
        run = Run(training, work, processes, end, student.path)
        log = train_in(run, training, model, text, asked.path if asked else None)
        trained = _in_one_piece(model, student.path)
        if draft is not None and trained is not None:
            _save(trained, student.path, draft.path)
            write_rows(log.steps, draft.path / "history.jsonl")
            if text.heldout is not None:
                write_rows(log.measured, draft.path / "monitors.jsonl")
            shutil.copytree(work / "tensorboard", draft.path / "tensorboard")
            draft.metrics |= {
                "parameters": trained.num_parameters(),
                "trainable_parameters": trained.num_parameters(only_trainable=True),
                "data_fingerprint": fingerprint(text.blocks),
                "processes": processes.count,
                **training_metrics(log, config.tokens),
                **_learnt(text),
            }
    return Artifact.open(out, expect="checkpoint")


def require_modelopt() -> None:
    """Import the trainers that training stands on, before anything expensive is done.

    Raises:
        MissingDependencyError: if they are not installed.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit", category=DeprecationWarning)
        require("modelopt.torch.distill.plugins.huggingface", extra="compress")


def text_of(config: DistillConfig, tokenizer: "PreTrainedTokenizerBase") -> Text:
    """All blocks of the run."""
    if config.two_tasks is not None:
        return config.two_tasks.text(config.data, tokenizer, config)
    blocks = token_blocks(
        config.data, tokenizer, split="train", count=config.sequences, seed=config.seed
    )
    if config.monitor is None:
        return Text(blocks)
    return Text(blocks, config.monitor.text(config.data, tokenizer, seed=config.seed))


def _learnt(text: Text) -> dict[str, int]:
    """How many tokens are learnt, where some are only read."""
    return {} if text.weights is None else {"learnt_tokens": int((text.weights > 0).sum())}


def _with_pairs(config: DistillConfig, student: Artifact, teacher: Artifact) -> DistillConfig:
    """The settings with the layers of every feature written out, but for those to be measured."""
    shapes = read_shape(student.path), read_shape(teacher.path)
    kept: Any = student.metrics.get("kept_layers")
    return config.model_copy(update={"features": with_pairs(config.features, *shapes, kept)})


def _in_one_piece(model: "PreTrainedModel", source: Path) -> "PreTrainedModel | None":
    from trt_kd.training.sharding import in_one_piece

    return in_one_piece(model, lambda: load_model(source, dtype="float32"))


def _save(model: "PreTrainedModel", source: Path, out: Path) -> None:
    """Write the trained weights in the dtype of the checkpoint ``source``."""
    import torch

    model.to(getattr(torch, stored_dtype(source)))
    save_model(model, out, tokenizer_from=source)
