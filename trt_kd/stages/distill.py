"""Train a pruned student: imitate the teacher, or hard labels alone as the control."""

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, NonNegativeFloat, model_validator
from typing_extensions import Self

from trt_kd.architectures.shape import read_shape
from trt_kd.artifacts import Artifact, Draft, work_directory, work_key, writing
from trt_kd.artifacts.manifest import sha256_of
from trt_kd.checkpoints import load_model, load_tokenizer, save_model, stored_dtype
from trt_kd.config import StageConfig, plugin_field
from trt_kd.data.base import DataConfig, fingerprint, token_blocks
from trt_kd.errors import ConfigError, ModelError
from trt_kd.losses import LOSSES
from trt_kd.losses.base import KDLoss
from trt_kd.losses.kl import ForwardKL
from trt_kd.optional import require
from trt_kd.seeding import seed_everything
from trt_kd.teachers import TEACHERS
from trt_kd.teachers.base import Teacher
from trt_kd.teachers.online import OnlineTeacher
from trt_kd.training.checkpointing import check_space, claim
from trt_kd.training.distributed import Processes, joined
from trt_kd.training.history import final_losses, write_history
from trt_kd.training.packing import Packing
from trt_kd.training.run import Run
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
    data: DataConfig = DataConfig()
    """Training text; blocks are read in order, each once."""
    packing: Packing = Packing()
    """How documents that share a block see each other."""

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

    @model_validator(mode="after")
    def _teacher_reads_the_same_documents(self) -> Self:
        if self.packing.reset and self.response_weight and self.teacher.kind != "online":
            raise ValueError(
                f"packing.reset needs teacher online: {self.teacher.kind} reads a block as one text"
            )
        return self

    @property
    def tokens(self) -> int:
        """Tokens that the run reads."""
        return self.sequences * self.data.block_tokens

    def outside(self) -> dict[str, str]:
        """Fingerprint of the training text."""
        return self.data.outside()

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
            }
        )


def distill(
    config: DistillConfig, *, student: Artifact, teacher: Artifact | None = None, out: Path
) -> Artifact:
    """Train checkpoint ``student`` and write it, in its own dtype, to ``out``.

    Goes on from its last training checkpoint if an earlier run with the same settings was cut off.

    Raises:
        ConfigError: if a teacher is missing, or given and not used.
        ModelError: if teacher and student do not share vocabulary and tokenizer.
        DataError: if the text is too short for the steps.
        TrtKdError: if the loss stops being finite.
    """
    check_teacher(config, has_teacher=teacher is not None)
    if teacher is not None:
        check_pair(student=student.path, teacher=teacher.path)
    require_modelopt()
    inputs = {"student": student} | ({"teacher": teacher} if teacher is not None else {})
    with joined() as processes, writing_once(processes, out, config, inputs) as draft:
        config.passes(processes.count)
        work = work_directory(out)
        tokenizer = load_tokenizer(student.path)
        with processes.main_first():
            blocks = token_blocks(
                config.data, tokenizer, split="train", count=config.sequences, seed=config.seed
            )
            if processes.main:
                check_space(out.parent, read_shape(student.path).parameters)
                keys = {role: artifact.key for role, artifact in inputs.items()}
                claim(work, work_key(config, keys))
        seed_everything(config.seed)
        model = load_model(student.path, dtype="float32")
        end = tokenizer.eos_token_id if config.packing.reset else None
        run = Run(config, work, processes, end)
        history = train_in(run, config, model, blocks, teacher.path if teacher else None)
        trained = _in_one_piece(model, student.path)
        if draft is not None and trained is not None:
            _save(trained, student.path, draft.path)
            write_history(history, draft.path / "history.jsonl")
            shutil.copytree(work / "tensorboard", draft.path / "tensorboard")
            draft.metrics |= {
                "parameters": trained.num_parameters(),
                "trainable_parameters": trained.num_parameters(only_trainable=True),
                "data_fingerprint": fingerprint(blocks),
                "processes": processes.count,
                **training_metrics(config, history),
            }
    return Artifact.open(out, expect="checkpoint")


@contextmanager
def writing_once(
    processes: Processes, out: Path, config: StageConfig, inputs: Mapping[str, Artifact]
) -> Iterator[Draft | None]:
    """Yield the draft of checkpoint ``out`` on process 0, None on the others.

    They go on once it was begun and leave once it is finished.

    Raises:
        ArtifactError: see ``writing``.
        TrtKdError: if process 0 failed.
    """
    with ExitStack() as stack:
        with processes.main_first():
            draft = (
                stack.enter_context(writing(out, kind="checkpoint", config=config, inputs=inputs))
                if processes.main
                else None
            )
        yield draft
        with processes.main_first():
            stack.close()


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
    """Train ``model`` in place on ``blocks`` in order, in this process; return the log by step.

    ``teacher`` is a checkpoint, or a cache of log-probabilities that holds every block.
    """
    return train_in(Run(config, work), config, model, blocks, teacher)


def train_in(
    run: Run,
    config: DistillConfig,
    model: "PreTrainedModel",
    blocks: "NDArray[np.int64]",
    teacher: "Path | Cache | None",
) -> list[dict[str, float]]:
    """The same among the processes of ``run``, each of which has to call it.

    Raises:
        ValueError: if documents shall be told apart and the run does not say what ends one.
    """
    if config.packing.reset and run.end is None:
        raise ValueError("packing.reset needs the token that ends a document: give the run its end")
    from trt_kd.training.head import Objective
    from trt_kd.training.loop import train

    objective = Objective(
        config.loss, config.task_weight, config.response_weight, config.label_smoothing
    )
    with run.processes.main_first():  # it writes a cache, the others read it
        targets = (
            config.teacher.targets(teacher, blocks, precision=config.precision, work=run.work)
            if isinstance(teacher, Path)
            else teacher
        )
    return train(model, targets, blocks, objective=objective, run=run)


def training_metrics(config: DistillConfig, history: list[dict[str, float]]) -> dict[str, float]:
    """Final losses (mean of the last ten steps), tokens and speed, over all sittings of a run."""
    seconds = sum(row["seconds"] for row in history)
    return {
        "steps": len(history),
        "tokens_trained": config.tokens,
        "seconds": seconds,
        "tokens_per_s": config.tokens / seconds,
        **final_losses(history),
    }


def check_teacher(config: DistillConfig, *, has_teacher: bool) -> None:
    """Check that a teacher is given if and only if the objective uses one.

    Raises:
        ConfigError: if it is not so.
    """
    if config.response_weight and not has_teacher:
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

    Raises:
        ModelError: if vocabulary sizes or tokenizers differ.
    """
    sizes = {"student": read_shape(student).vocab, "teacher": read_shape(teacher).vocab}
    if sizes["student"] != sizes["teacher"]:
        raise ModelError(
            f"the student has {sizes['student']:,} tokens and the teacher {sizes['teacher']:,}",
            hint="token distillation needs one vocabulary: prune the student from this teacher",
        )
    if _digest(student / "tokenizer.json") != _digest(teacher / "tokenizer.json"):
        raise ModelError(
            f"tokenizer.json of {student} and {teacher} differ",
            hint="token distillation needs one tokenizer: prune the student from this teacher",
        )


def _digest(path: Path) -> str:
    if not path.is_file():
        raise ModelError(f"{path} is missing", hint="import the model again from its source")
    return sha256_of(path)


def _in_one_piece(model: "PreTrainedModel", source: Path) -> "PreTrainedModel | None":
    from trt_kd.training.sharding import in_one_piece

    return in_one_piece(model, lambda: load_model(source, dtype="float32"))


def _save(model: "PreTrainedModel", source: Path, out: Path) -> None:
    """Write the trained weights in the dtype of the checkpoint ``source``."""
    import torch

    model.to(getattr(torch, stored_dtype(source)))
    save_model(model, out, tokenizer_from=source)
