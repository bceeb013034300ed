"""Train a pruned student: imitate the teacher, or hard labels alone as the control."""

import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

from pydantic import Field, model_validator
from typing_extensions import Self

from trt_kd.architectures.shape import read_shape
from trt_kd.artifacts import Artifact, work_directory, work_key, writing
from trt_kd.artifacts.manifest import sha256_of
from trt_kd.checkpoints import load_model, load_tokenizer, save_model, stored_dtype
from trt_kd.config import StageConfig, plugin_field
from trt_kd.data.base import DataConfig, fingerprint, token_blocks
from trt_kd.errors import ConfigError, ModelError
from trt_kd.evaluation.vocabulary import check_padding
from trt_kd.losses import LOSSES
from trt_kd.losses.base import KDLoss
from trt_kd.losses.kl import ForwardKL
from trt_kd.optional import require
from trt_kd.seeding import seed_everything
from trt_kd.teachers import TEACHERS
from trt_kd.teachers.base import Teacher
from trt_kd.teachers.online import OnlineTeacher
from trt_kd.training.alarms import ALARMS, Need
from trt_kd.training.checkpointing import check_space, claim
from trt_kd.training.features import with_pairs
from trt_kd.training.history import TrainingLog, training_metrics, write_rows
from trt_kd.training.monitors import MonitorConfig
from trt_kd.training.schedule import Schedule
from trt_kd.training.weights import (
    Weight,
    WeightSchedule,
    over_whole_run,
    peak,
    step_without_term,
    weight_at,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from trt_kd.teachers.cache import Cache


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
                f"{problem}, which teacher {self.teacher.kind} has not; choices at their "
                f"defaults: {', '.join(choices)}; any with teacher online"
            )
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
        }
        return frozenset(need for need, there in found.items() if there)

    @property
    def tokens(self) -> int:
        """Tokens that the run reads."""
        return self.sequences * self.data.block_tokens

    def outside(self) -> dict[str, str]:
        """Fingerprints of the training text and of what the teacher reads."""
        return {**self.data.outside(), **self.teacher.outside()}

    def rehearsal(self) -> Self:
        """Two steps of one sequence, a checkpoint after each."""
        return self.model_copy(
            update={
                "steps": 2,
                "batch_size": 1,
                "gradient_accumulation": 1,
                "warmup_steps": min(self.warmup_steps, 1),
                "checkpoint_every_steps": 1,
                "teacher": self.teacher.rehearsal(),
                "task_weight": over_whole_run(self.task_weight),
                "response_weight": over_whole_run(self.response_weight),
                "monitor": self.monitor and MonitorConfig(every_steps=1, blocks=1, skip_blocks=0),
                "features": [feature.rehearsal() for feature in self.features],
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
                "stop_on": [a.name for a in ALARMS if a.name in self.stop_on and a.needs <= plain],
            }
        )


def distill(
    config: DistillConfig, *, student: Artifact, teacher: Artifact | None = None, out: Path
) -> Artifact:
    """Train checkpoint ``student`` and write it, in its own dtype, to ``out``.

    Goes on from its last training checkpoint if an earlier run with the same settings was cut off.

    Raises:
        ConfigError: if a teacher is missing, or given and not used.
        ModelError: if teacher and student do not share vocabulary and tokenizer, or the teacher is
            the smaller one.
        DataError: if the text is too short for the steps.
        TrtKdError: if the loss stops being finite.
    """
    check_teacher(config, has_teacher=teacher is not None)
    training = config
    if teacher is not None:
        for path in (teacher.path, *config.teacher.further()):
            check_pair(student=student.path, teacher=path)
        check_sizes(config, student=student.path, teacher=teacher.path)
        training = _with_pairs(config, student, teacher)
    require_modelopt()
    inputs = {"student": student} | ({"teacher": teacher} if teacher is not None else {})
    with writing(out, kind="checkpoint", config=config, inputs=inputs) as draft:
        tokenizer = load_tokenizer(student.path)
        blocks = token_blocks(
            config.data, tokenizer, split="train", count=config.sequences, seed=config.seed
        )
        heldout = (
            config.monitor.text(config.data, tokenizer, seed=config.seed)
            if config.monitor
            else None
        )
        work = work_directory(out)
        check_space(out.parent, read_shape(student.path).parameters)
        claim(work, work_key(config, {role: artifact.key for role, artifact in inputs.items()}))
        seed_everything(config.seed)
        model = load_model(student.path, dtype="float32")
        asked = teacher or (student if config.uses_teacher else None)
        log = train_student(
            training, model, blocks, asked.path if asked else None, work, heldout=heldout
        )
        _save(model, student.path, draft.path)
        write_rows(log.steps, draft.path / "history.jsonl")
        if heldout is not None:
            write_rows(log.measured, draft.path / "monitors.jsonl")
        shutil.copytree(work / "tensorboard", draft.path / "tensorboard")
        draft.metrics |= {
            "parameters": model.num_parameters(),
            "trainable_parameters": model.num_parameters(only_trainable=True),
            "data_fingerprint": fingerprint(blocks),
            **training_metrics(log, config.tokens),
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


def train_student(
    config: DistillConfig,
    model: "PreTrainedModel",
    blocks: "NDArray[np.int64]",
    teacher: "Path | Cache | None",
    work: Path,
    *,
    heldout: "NDArray[np.int64] | None" = None,
) -> TrainingLog:
    """Train ``model`` in place on ``blocks`` in order; return the log.

    ``teacher`` is a checkpoint, or a cache of log-probabilities that holds every block, those of
    ``heldout`` included, which the monitor measures on; without them there is none.
    """
    import numpy as np

    from trt_kd.training.head import Objective
    from trt_kd.training.loop import Text, train

    def objective_at(step: int) -> Objective:
        task, response = (
            weight_at(weight, step, config.steps)
            for weight in (config.task_weight, config.response_weight)
        )
        return Objective(config.loss, task, response, config.label_smoothing)

    seen = blocks if heldout is None else np.concatenate([blocks, heldout])
    targets = (
        config.teacher.targets(
            teacher,
            seen,
            precision=config.precision,
            work=work,
            vocabulary=model.config.vocab_size,
        )
        if isinstance(teacher, Path)
        else teacher
    )
    if config.features:
        from trt_kd.training.similarity import by_similarity

        beside = cast("PreTrainedModel", targets)
        features = by_similarity(config.features, model, beside, blocks, work)
        config = config.model_copy(update={"features": features})
    text = Text(blocks, heldout)
    return train(model, targets, text, objective_at=objective_at, schedule=config, work=work)


def check_teacher(config: DistillConfig, *, has_teacher: bool) -> None:
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
        raise ModelError(
            f"tokenizer.json of {student} and {teacher} differ",
            hint="token distillation needs one tokenizer: prune the student from this teacher",
        )


def check_sizes(config: DistillConfig, *, student: Path, teacher: Path) -> None:
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


def _with_pairs(config: DistillConfig, student: Artifact, teacher: Artifact) -> DistillConfig:
    """The settings with the layers of every feature written out, but for those to be measured."""
    shapes = read_shape(student.path), read_shape(teacher.path)
    kept: Any = student.metrics.get("kept_layers")
    return config.model_copy(update={"features": with_pairs(config.features, *shapes, kept)})


def _digest(path: Path) -> str:
    if not path.is_file():
        raise ModelError(f"{path} is missing", hint="import the model again from its source")
    return sha256_of(path)


def _save(model: "PreTrainedModel", source: Path, out: Path) -> None:
    """Write the trained weights in the dtype of the checkpoint ``source``."""
    import torch

    model.to(getattr(torch, stored_dtype(source)))
    save_model(model, out, tokenizer_from=source)
