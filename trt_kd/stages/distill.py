"""Train a pruned student: imitate the teacher, or hard labels alone as the control."""

import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, NonNegativeFloat, model_validator
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
from trt_kd.training.checkpointing import check_space, claim
from trt_kd.training.history import dropped_mass, final_losses, write_history
from trt_kd.training.schedule import Schedule

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
    response_weight: NonNegativeFloat = 1.0
    """Weight of the loss against the teacher; 0 trains without one."""
    task_weight: NonNegativeFloat = 0.0
    """Weight of cross-entropy with the text itself; it pulls towards narrow text."""
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
        if not self.task_weight and not self.response_weight:
            raise ValueError("task_weight and response_weight are both 0: nothing to learn")
        if self.label_smoothing and not self.task_weight:
            raise ValueError("label_smoothing has no effect: task_weight is 0")
        return self

    @model_validator(mode="after")
    def _teacher_gives_what_the_loss_needs(self) -> Self:
        problem = self.teacher.problem(self.loss) if self.response_weight else None
        if problem:
            losses = [LOSSES.load(name)(kind=name) for name in LOSSES.names()]
            choices = [loss.kind for loss in losses if self.teacher.problem(loss) is None]
            raise ValueError(
                f"{problem}, which teacher {self.teacher.kind} has not; choices at their "
                f"defaults: {', '.join(choices)}; any with teacher online"
            )
        return self

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
            }
        )

    def cross_entropy(self) -> Self:
        """The control: the same tokens and steps on hard labels alone, without a teacher."""
        return self.model_copy(
            update={
                "task_weight": 1.0,
                "response_weight": 0.0,
                "label_smoothing": 0.0,
                "loss": ForwardKL(),
                "teacher": OnlineTeacher(),
                "allow_smaller_teacher": False,
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
    if teacher is not None:
        for path in (teacher.path, *config.teacher.further()):
            check_pair(student=student.path, teacher=path)
        check_sizes(config, student=student.path, teacher=teacher.path)
    require_modelopt()
    inputs = {"student": student} | ({"teacher": teacher} if teacher is not None else {})
    with writing(out, kind="checkpoint", config=config, inputs=inputs) as draft:
        tokenizer = load_tokenizer(student.path)
        blocks = token_blocks(
            config.data, tokenizer, split="train", count=config.sequences, seed=config.seed
        )
        work = work_directory(out)
        check_space(out.parent, read_shape(student.path).parameters)
        claim(work, work_key(config, {role: artifact.key for role, artifact in inputs.items()}))
        seed_everything(config.seed)
        model = load_model(student.path, dtype="float32")
        asked = teacher or (student if config.response_weight else None)
        history = train_student(config, model, blocks, asked.path if asked else None, work)
        _save(model, student.path, draft.path)
        write_history(history, draft.path / "history.jsonl")
        shutil.copytree(work / "tensorboard", draft.path / "tensorboard")
        draft.metrics |= {
            "parameters": model.num_parameters(),
            "trainable_parameters": model.num_parameters(only_trainable=True),
            "data_fingerprint": fingerprint(blocks),
            **training_metrics(config, history),
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
) -> list[dict[str, float]]:
    """Train ``model`` in place on ``blocks`` in order; return the log by step.

    ``teacher`` is a checkpoint, or a cache of log-probabilities that holds every block.
    """
    from trt_kd.training.head import Objective
    from trt_kd.training.loop import train

    objective = Objective(
        config.loss, config.task_weight, config.response_weight, config.label_smoothing
    )
    targets = (
        config.teacher.targets(
            teacher,
            blocks,
            precision=config.precision,
            work=work,
            vocabulary=model.config.vocab_size,
        )
        if isinstance(teacher, Path)
        else teacher
    )
    return train(model, targets, blocks, objective=objective, schedule=config, work=work)


def training_metrics(config: DistillConfig, history: list[dict[str, float]]) -> dict[str, float]:
    """Final losses (mean of the last ten steps), tokens and speed, over all sittings of a run."""
    seconds = sum(row["seconds"] for row in history)
    return {
        "steps": len(history),
        "tokens_trained": config.tokens,
        "seconds": seconds,
        "tokens_per_s": config.tokens / seconds,
        **final_losses(history),
        **dropped_mass(history),
    }


def check_teacher(config: DistillConfig, *, has_teacher: bool) -> None:
    """Check that a teacher's checkpoint is given if and only if the objective uses one.

    Raises:
        ConfigError: if it is not so.
    """
    if has_teacher and config.response_weight and not config.teacher.needs_checkpoint:
        raise ConfigError(
            f"teacher {config.teacher.kind} reads no checkpoint: the one given has no effect",
            hint="leave it out, or choose another kind of teacher",
        )
    if config.response_weight and config.teacher.needs_checkpoint and not has_teacher:
        raise ConfigError(
            f"response_weight {config.response_weight:g} needs a teacher and none is given",
            hint="give one, or set response_weight=0 and task_weight=1",
        )
    if has_teacher and not config.response_weight:
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
        ModelError: if it is smaller.
    """
    counts = [read_shape(path).parameters for path in (student, teacher)]
    if counts[1] < counts[0] and not config.allow_smaller_teacher:
        raise ModelError(
            f"the teacher has {counts[1]:,} parameters and the student {counts[0]:,}",
            hint="are the two mixed up? If a small model shall teach, set allow_smaller_teacher",
        )


def _digest(path: Path) -> str:
    if not path.is_file():
        raise ModelError(f"{path} is missing", hint="import the model again from its source")
    return sha256_of(path)


def _save(model: "PreTrainedModel", source: Path, out: Path) -> None:
    """Write the trained weights in the dtype of the checkpoint ``source``."""
    import torch

    model.to(getattr(torch, stored_dtype(source)))
    save_model(model, out, tokenizer_from=source)
