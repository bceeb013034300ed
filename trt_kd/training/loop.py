"""One training run from its settings to its log, resumed where a killed one stood."""

import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

from trt_kd.checkpoints import load_tokenizer
from trt_kd.heap import kept_pages
from trt_kd.teachers.cache import Cache
from trt_kd.teachers.cross_tokenizer import Translated
from trt_kd.teachers.forward import check_linear_head
from trt_kd.teachers.mixing import Mixture
from trt_kd.teachers.writer import ends_of
from trt_kd.training.attention import blockwise_attention
from trt_kd.training.balancing import balancer_of
from trt_kd.training.blocks import Blocks
from trt_kd.training.callbacks import EventFiles, MarkCheckpoints, Progress
from trt_kd.training.checkpointing import newest_complete
from trt_kd.training.crossing import CrossTrainer
from trt_kd.training.distributed import STEP_LIMIT
from trt_kd.training.feature_terms import Escalate, KeepFeatures, terms_of
from trt_kd.training.history import TrainingLog, log_of
from trt_kd.training.lean import lean
from trt_kd.training.objective import ObjectiveAt
from trt_kd.training.packing import check_packing
from trt_kd.training.rollout import Rollout
from trt_kd.training.run import Run, Text
from trt_kd.training.schedule import Schedule
from trt_kd.training.several import SeveralTrainer
from trt_kd.training.sharding import FSDP2, check_sharding, let_accelerate_shard
from trt_kd.training.tied import rows_into_head
from trt_kd.training.trainer import CachedTrainer, DistillTrainer, TaskTrainer
from trt_kd.training.watching import Alarms, Monitor

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from trt_kd.teachers.base import Targets

logger = logging.getLogger(__name__)

_READ = ("ACCELERATE_", "FSDP_")
"""Beginnings of the names of variables that accelerate reads."""


def train(
    student: PreTrainedModel,
    teacher: "Targets | None",
    text: Text,
    *,
    objective_at: ObjectiveAt,
    run: Run,
) -> TrainingLog:
    """Train ``student`` (float32 weights) in place on ``text`` in order; return the log.

    Checkpoints go to ``checkpoints`` in the work folder, TensorBoard's event file to
    ``tensorboard``. A run that finds a complete checkpoint there goes on from it. ``teacher`` runs
    beside the student (so do all of a mixture), or is a cache that holds all blocks, or is None for
    hard labels alone. Of several processes each makes the same call; the first writes. A sharded
    student stays sharded.

    Raises:
        ConfigError: if the processes cannot share a step's passes, the features or the teachers.
        ModelError: if logits are not those of a linear head, or documents cannot be kept apart.
        TrtKdError: if the loss is not finite, or an alarm stops the run; checkpoints stay.
    """
    schedule, work, processes = run.schedule, run.work, run.processes
    check_linear_head(student, "student")
    if run.end is not None:
        check_packing(student, "student")
    use_cache = student.config.use_cache
    progress = Progress(schedule.batch_size * schedule.gradient_accumulation * text.blocks.shape[1])
    events = EventFiles(work / "tensorboard")
    shown: list[TrainerCallback] = [progress, events] if processes.main else []
    checkpoints = work / "checkpoints"
    dtype = torch.bfloat16 if schedule.precision == "bf16" else torch.float32
    with _quiet(), _environment(schedule), _sparing(student, alone=processes.count == 1):
        settings: dict[str, Any] = {
            "model": student,
            "args": training_arguments(schedule, checkpoints, processes.count),
            "train_dataset": Blocks(text.blocks, run.end, text.weights, text.tasks),
            "callbacks": [*shown, MarkCheckpoints(checkpoints, processes)],
        }
        if schedule.sharding == "fsdp2":
            let_accelerate_shard(settings["args"])
        features = terms_of(schedule, student, teacher)
        if features is not None:  # its file belongs to a checkpoint: before the marker
            settings["callbacks"].insert(0, KeepFeatures(features, checkpoints))
            if schedule.features_if is not None:
                settings["callbacks"].append(Escalate(features, schedule.features_if))
        trainer = _trainer(teacher, settings, run)
        check_sharding(trainer, schedule.sharding)
        _remove_printers(trainer)
        trainer.start(objective_at, dtype, run.end)
        _equip(trainer, student, teacher, text, run)
        alarms = Alarms(schedule.stop_on)
        trainer.add_callback(alarms)
        if schedule.monitor is not None and text.heldout is not None:
            trainer.add_callback(Monitor(schedule.monitor, trainer, text.heldout, text.counted))
        resume = processes.share(lambda: _newest(checkpoints))
        if features is not None:
            trainer.features = features.resumed(Path(resume) if resume else None).to(
                trainer.args.device
            )
        try:
            trainer.train(resume_from_checkpoint=resume)
        finally:
            student.config.use_cache = use_cache  # the trainer switches it off
            progress.close()
            events.close()
    alarms.check()
    return log_of(trainer.state.log_history)


@contextmanager
def _sparing(student: PreTrainedModel, *, alone: bool) -> Iterator[None]:
    """Let a step keep little, and make little of what it does not keep."""
    rows = rows_into_head(student) if alone else nullcontext()
    with kept_pages(), lean(student), rows, blockwise_attention():
        yield


def _trainer(teacher: "Targets | None", settings: dict[str, Any], run: Run) -> Any:
    """The trainer for what the teacher is."""
    if teacher is None:
        return TaskTrainer(**settings)
    if isinstance(teacher, Cache):
        trainer: Any = CachedTrainer(**settings)
        trainer.cache = teacher
        return trainer
    models = teacher.models if isinstance(teacher, Mixture) else [_model(teacher)]
    for model in models:
        check_linear_head(model, "teacher")
        if run.end is not None:
            check_packing(model, "teacher")
    beside = {"distill_args": {"teacher_model": models[0]}}
    if isinstance(teacher, Translated):
        crossing = CrossTrainer(**settings, **beside)
        crossing.translator = teacher.translator
        return crossing
    if not isinstance(teacher, Mixture):
        return DistillTrainer(**settings, **beside)
    if run.schedule.sharding != "none":
        raise ValueError("several teachers cannot be sharded")
    trainer = SeveralTrainer(**settings, **beside)
    trainer.mixture = teacher
    return trainer


def _model(teacher: PreTrainedModel | Translated) -> PreTrainedModel:
    return teacher.model if isinstance(teacher, Translated) else teacher


def _equip(
    trainer: Any, student: PreTrainedModel, teacher: "Targets | None", text: Text, run: Run
) -> None:
    """Give the trainer what steps may have beside the plain objective."""
    trainer.task_weights = text.tasks.weights if text.tasks else {}
    trainer.rollout = _rollout(student, teacher, run)
    trainer.balancer = balancer_of(run.schedule)
    trainer.exits = run.schedule.exits


def _rollout(student: PreTrainedModel, teacher: "Targets | None", run: Run) -> Rollout | None:
    """What lets the student write, where the run wants it."""
    schedule = run.schedule
    if schedule.on_policy is None:
        return None
    eos: Any = load_tokenizer(run.tokenizer).eos_token_id if run.tokenizer else None
    ends = ends_of(student, eos)
    models = teacher.models if isinstance(teacher, Mixture) else [teacher]
    readers = [model for model in models if isinstance(model, PreTrainedModel)]
    known = min((model.config.vocab_size for model in readers), default=None)
    return Rollout(
        schedule.on_policy, schedule.seed, ends, schedule.precision, run.processes, known
    )


def training_arguments(
    schedule: Schedule, checkpoints: Path, processes: int = 1
) -> TrainingArguments:
    """Arguments of the Hugging Face trainer: one device a process, nothing reported outside.

    Raises:
        ConfigError: if a step's passes cannot be shared by the processes.
    """
    cuda = torch.cuda.is_available()
    passes = schedule.passes(processes)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=schedule.steps,
        per_device_train_batch_size=schedule.batch_size,
        gradient_accumulation_steps=passes,
        learning_rate=schedule.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=schedule.warmup_steps,
        weight_decay=schedule.weight_decay,
        max_grad_norm=schedule.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=schedule.precision == "bf16",
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=schedule.checkpoint_every_steps,
        seed=schedule.seed,
        gradient_checkpointing=schedule.gradient_checkpointing,
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False if processes > 1 else None,
        ddp_timeout=int(STEP_LIMIT.total_seconds()),
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several visible GPUs would mean nn.DataParallel and larger batches
    return arguments


def _newest(checkpoints: Path) -> str | None:
    found = newest_complete(checkpoints)
    return str(found) if found else None


def _remove_printers(trainer: Any) -> None:
    """Remove callbacks that print or draw: Hugging Face's and ModelOpt's memory report."""
    theirs: list[type[TrainerCallback]] = [PrinterCallback, ProgressCallback]
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback) in theirs or type(callback).__name__ == "_MemoryReportCallback":
            trainer.remove_callback(callback)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' messages from standard output and their bars from ours."""
    printed = io.StringIO()
    bars: Any = transformers_logging
    had_bars = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        if had_bars:
            bars.enable_progress_bar()
        for line in printed.getvalue().splitlines():
            logger.debug("%s", line)


@contextmanager
def _environment(schedule: Schedule) -> Iterator[None]:
    """Set for this run what accelerate reads; transformers 4 leaves it set for the next one."""
    before = {name: value for name, value in os.environ.items() if name.startswith(_READ)}
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if schedule.precision == "bf16" else "no"
    os.environ.update(FSDP2 if schedule.sharding == "fsdp2" else {})
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith(_READ)]:
            del os.environ[name]
        os.environ.update(before)
