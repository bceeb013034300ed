"""A student that is split over processes: its training checkpoints, and its weights in one piece.

Training checkpoints look the same however many processes wrote them, sharded or not, so a run goes
on with any other number.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainingArguments

from trt_kd.errors import ConfigError
from trt_kd.training.head import Head
from trt_kd.training.optimizer_state import read_state, write_state

WEIGHTS = "model.safetensors"


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_SYNC_MODULE_STATES": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
"""What accelerate reads; transformers 4.57 cannot say the version in its arguments."""


def let_accelerate_shard(arguments: TrainingArguments) -> None:
    """Let accelerate shard on CPUs too, which it otherwise leaves out without a word.

    Its list of device kinds decides whether a plugin for FSDP is looked at; torch's own
    ``fully_shard`` works over gloo.
    """
    state: Any = arguments.distributed_state
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


def check_sharding(trainer: Any, wanted: str) -> None:
    """Check that ``trainer`` shards as its settings say, with parameters in float32.

    Raises:
        ConfigError: if accelerate chose otherwise, as its variables may make it.
    """
    if (wanted == "fsdp2") != trainer.is_fsdp_enabled:
        raise ConfigError(
            f"sharding is {wanted}, and accelerate has FSDP "
            f"{'on' if trainer.is_fsdp_enabled else 'off'}",
            hint="unset ACCELERATE_USE_FSDP and ACCELERATE_USE_DEEPSPEED; say it in the settings",
        )
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = None


class PortableCheckpoints:
    """Writes and reads training checkpoints. Mixed in before a Hugging Face trainer."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        trainer: Any = self
        write = trainer.args.should_save
        write_state(trainer.optimizer, trainer.lr_scheduler, Path(output_dir), write=write)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        trainer: Any = self
        if checkpoint is not None:
            read_state(trainer.optimizer, trainer.lr_scheduler, Path(checkpoint))

    def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
        trainer: Any = self
        if not trainer.is_fsdp_enabled:
            super()._load_from_checkpoint(checkpoint, model)  # type: ignore[misc]
            return
        weights: dict[str, Any] = {}
        if trainer.args.should_save:
            weights |= load_file(Path(checkpoint) / WEIGHTS)
        set_model_state_dict(
            trainer.model if model is None else model,
            weights,
            options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False),
        )


def gathered(model: nn.Module, head_of: Callable[[nn.Module], Head]) -> Head:
    """The head of ``model``, whole where it is sharded; every process has to call it."""
    if not isinstance(model, FSDPModule):
        return head_of(model)
    model.reshard()  # what a forward pass gathered goes away with it
    head = head_of(model)
    return Head(_full(head.weight), None if head.bias is None else _full(head.bias))


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def in_one_piece(
    model: PreTrainedModel, load: Callable[[], PreTrainedModel]
) -> PreTrainedModel | None:
    """``model`` itself, or on process 0 a whole one with its weights where it is sharded.

    Every process has to call it; ``load`` makes a model of the same sizes on the CPU.
    """
    if not isinstance(model, FSDPModule):
        return model
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if not weights:
        return None
    plain = load()
    plain.load_state_dict(weights, strict=not plain.config.tie_word_embeddings)
    return plain
