"""Train a model in its quantizers: quantization-aware distillation (QAD) or training (QAT).

The teacher is the model itself before it was quantized. With the text's own labels instead
(``task_weight: 1``, ``response_weight: 0``) it is plain quantization-aware training. Source:
Jacob et al. 2017 (arXiv:1712.05877); distilled, Polino et al. 2018 (arXiv:1802.05668).
"""

from pathlib import Path
from typing import TYPE_CHECKING

from trt_kd.architectures.shape import read_shape
from trt_kd.artifacts import Artifact
from trt_kd.checkpoints import load_tokenizer, stored_dtype
from trt_kd.quantization.base import QuantizationFormat
from trt_kd.seeding import seed_everything
from trt_kd.stages.distill import DistillConfig, require_modelopt, text_of
from trt_kd.stages.teaching import train_in
from trt_kd.training.checkpointing import check_space, claim
from trt_kd.training.distributed import require_one_process
from trt_kd.training.history import TrainingLog, write_rows
from trt_kd.training.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEACHERS = ("online", "cached")
"""How the logits of the unquantized model may be had."""
_ALONE = ("features", "features_if", "exits", "balance", "on_policy", "two_tasks")


def option_problem(config: DistillConfig, quantization: QuantizationFormat) -> str | None:
    """Why a model in ``quantization`` is not trained with these settings; None if it is."""
    if not quantization.trainable:
        return (
            f"the scales of {quantization.kind} cannot follow the weights: choose another format, "
            "such as fp8, int4_awq or mixed"
        )
    for name in _ALONE:
        if getattr(config, name):
            return f"{name} has no place in a quantized model: leave it out"
    if config.uses_teacher and config.teacher.kind not in TEACHERS:
        return (
            f"the teacher is the model before quantization, {' or '.join(TEACHERS)}: "
            f"{config.teacher.kind} would be another"
        )
    if config.allow_smaller_teacher:
        return "allow_smaller_teacher has no effect: the teacher is the model before quantization"
    if config.sharding != "none":
        return f"sharding {config.sharding} does not take quantizers: leave it out"
    return None


def begin(work: Path, key: str, source: Artifact) -> None:
    """Give the folder ``work`` to the work with identity ``key``, before anything is done.

    Raises:
        ConfigError: if a launcher started several processes.
        MissingDependencyError: if the trainers are not installed.
        ArtifactError: if checkpoints do not fit on the disk.
    """
    require_one_process("training in quantizers")
    require_modelopt()
    check_space(work.parent, read_shape(source.path).parameters)
    claim(work, key)


def train_quantized(
    config: DistillConfig, model: "PreTrainedModel", *, source: Artifact, work: Path
) -> TrainingLog:
    """Train the calibrated ``model`` (float32), made from ``source``, in place; return the log.

    Goes on from the last checkpoint in ``work``. The model ends in the dtype of the source.

    Raises:
        TrtKdError: if the loss stops being finite, or an alarm stops the run.
    """
    import torch

    from trt_kd.quantization.training import make_trainable, settle

    tokenizer = load_tokenizer(source.path)
    text = text_of(config, tokenizer)
    seed_everything(config.seed)
    make_trainable(model)
    end = tokenizer.eos_token_id if config.packing.reset else None
    run = Run(config, work, end=end, tokenizer=source.path)
    log = train_in(run, config, model, text, source.path if config.uses_teacher else None)
    model.eval()  # type: ignore[no-untyped-call]
    settle(model, getattr(torch, stored_dtype(source.path)))
    return log


def write_log(log: TrainingLog, out: Path) -> None:
    """Write every step, and every measurement on held-out text, into the folder ``out``."""
    write_rows(log.steps, out / "history.jsonl")
    if log.measured:
        write_rows(log.measured, out / "monitors.jsonl")
