"""Prune a checkpoint: fewer MLP channels, a narrower residual stream, fewer layers."""

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, PositiveInt, SerializeAsAny, model_validator
from typing_extensions import Self

from trt_kd.architectures import architecture_of
from trt_kd.architectures.shape import ModelShape, read_shape
from trt_kd.artifacts import Artifact, writing
from trt_kd.checkpoints import load_model, load_tokenizer, save_model, stored_dtype
from trt_kd.config import StageConfig, build_plugin
from trt_kd.data.base import DataConfig, documents, fingerprint, token_blocks
from trt_kd.errors import ConfigError, VerificationError
from trt_kd.optional import require
from trt_kd.pruning import AXES, IMPORTANCE
from trt_kd.pruning.base import Axis, Importance
from trt_kd.pruning.budget import Budget
from trt_kd.pruning.catalogue import Target
from trt_kd.pruning.importance import Activation
from trt_kd.pruning.reconstruction import Reconstruct
from trt_kd.pruning.sizes import check_axes, planned_shape, settled

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_BATCH = 4
SEQUENTIAL = frozenset({"ffn", "heads", "kv_heads", "depth"})
"""Axes whose cut leaves the residual stream's size and every token's way as they are."""
# On a twin of two layers the embeddings weigh most of the model: its share has to stay near one.
_REHEARSAL_SHARE = 0.97


class PruneConfig(StageConfig):
    """What to cut and on how much evidence."""

    stage: ClassVar[str] = "prune"

    axes: Annotated[
        list[Annotated[SerializeAsAny[Axis], BeforeValidator(partial(build_plugin, AXES))]],
        Field(min_length=1),
    ]
    """What shrinks; all axes are scored on the unpruned model."""
    budget: Budget | None = None
    """Limits, such as ``{params: 80%}``, that settle the one axis left without a size."""
    target: Target = Target()
    """Format, runtime, GPU and tensor-parallel size that every size has to be legal for."""
    importance: Annotated[
        SerializeAsAny[Importance], BeforeValidator(partial(build_plugin, IMPORTANCE))
    ] = Activation()
    """How channels are ranked; layers are ranked by the importance of the depth axis."""
    reconstruct: Reconstruct | None = Reconstruct()
    """Refit what reads the cut units; null keeps the plain cut."""
    calibration_tokens: PositiveInt = 16_384
    """Tokens of the training split behind scores and refit, in whole blocks."""
    data: DataConfig = DataConfig()
    """Calibration text."""
    seed: int = 0
    """Seeds the choice of text, and an importance that draws numbers."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        try:
            check_axes(self.axes, self.budget)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        if "channels" not in self.importance.units:
            raise ValueError(f"importance {self.importance.kind!r} does not rank channels")
        if self.importance != Activation() and not any(
            axis.unit == "channels" for axis in self.axes
        ):
            raise ValueError("importance ranks channels, and no axis cuts any; leave it out")
        if self.reconstruct is not None and self.reconstruct.schedule == "sequential":
            others = {axis.kind for axis in self.axes} - SEQUENTIAL
            if others:
                raise ValueError(
                    "reconstruct.schedule sequential does not go with "
                    f"{', '.join(sorted(others))}: only with {', '.join(sorted(SEQUENTIAL))}"
                )
        return self

    def outside(self) -> dict[str, str]:
        """Fingerprint of the calibration text."""
        return self.data.outside()

    def rehearsal(self) -> Self:
        """Two blocks, and axes that suit a model of two layers."""
        axes = [axis.rehearsed() for axis in self.axes]
        still_open = any(axis.is_open for axis in axes)
        return self.model_copy(
            update={
                "axes": axes,
                "budget": Budget(params=_REHEARSAL_SHARE) if still_open else None,
                "calibration_tokens": 2 * self.data.block_tokens,
            }
        )

    def planned(self, shape: ModelShape) -> ModelShape:
        """Shape after pruning a model of ``shape``; needs no torch.

        Raises:
            ConfigError: if the axes contradict each other.
            ModelError: if the architecture is not supported or has no such size.
        """
        architecture = architecture_of(shape.model_type)
        for axis in self.axes:
            architecture.check_axis(axis.kind, shape)
        return planned_shape(self.axes, self.budget, shape, self.target)

    def memory_bytes(self, shape: ModelShape) -> int:
        """Memory of pruning a model of ``shape``: float32 weights, activations, refit."""
        weights = 4 * shape.parameters
        widest = max(shape.ffn, shape.hidden, shape.heads * shape.head_dim)
        activations = 4 * _BATCH * self.data.block_tokens * (shape.layers * shape.hidden)
        activations += 4 * _BATCH * self.data.block_tokens * 8 * widest
        return weights + activations + self._refit_bytes(shape)

    def _refit_bytes(self, shape: ModelShape) -> int:
        """Gram matrices, and both residual streams with the next one of a sequential refit."""
        if self.reconstruct is None:
            return 0
        widths = self._refit_widths(shape)
        if self.reconstruct.schedule == "once":
            return self.reconstruct.memory_bytes(widths)
        streams = 3 * 4 * self.blocks() * self.data.block_tokens * shape.hidden
        return self.reconstruct.memory_bytes([max([shape.ffn, *widths])]) + streams

    def _refit_widths(self, shape: ModelShape) -> list[int]:
        """Inputs of the projections that will be refit."""
        cut = {axis.kind for axis in self.axes if axis.target(shape) < axis.read(shape)}
        mlps = shape.layers - shape.expert_layers if "ffn" in cut else 0
        blocks = shape.layers if cut & {"heads", "kv_heads"} else 0
        return [shape.ffn] * mlps + [shape.heads * shape.head_dim] * blocks

    def blocks(self) -> int:
        """Calibration blocks."""
        return -(-self.calibration_tokens // self.data.block_tokens)


def prune(config: PruneConfig, *, source: Artifact, out: Path) -> Artifact:
    """Turn checkpoint ``source`` into a smaller checkpoint at ``out``.

    Scores in float32, stores in the source's dtype.

    Raises:
        TrtKdError: if the model, the sizes or the text are unfit.
    """
    import torch

    shape = read_shape(source.path)
    planned = config.planned(shape)
    with writing(out, kind="checkpoint", config=config, inputs={"source": source}) as draft:
        blocks = token_blocks(
            config.data,
            load_tokenizer(source.path),
            split="train",
            count=config.blocks(),
            seed=config.seed,
        )
        model = _on_accelerator(load_model(source.path, dtype="float32"))
        draft.metrics["parameters_before"] = shape.parameters
        draft.metrics |= prune_model(config, model, blocks)
        kept = _drop_tokens(config, model, source, planned.vocab)
        draft.metrics["parameters_after"] = parameters = model.num_parameters()
        draft.metrics["parameters_share"] = parameters / shape.parameters
        draft.metrics["calibration_fingerprint"] = fingerprint(blocks)
        if parameters != planned.parameters:
            raise VerificationError(
                f"pruning left {parameters:,} parameters, planned were {planned.parameters:,}",
                hint="the model holds parts that its config.json does not tell of",
            )
        dtype = getattr(torch, stored_dtype(source.path))
        cast("nn.Module", model).to("cpu", dtype)
        save_model(model, draft.path, tokenizer_from=source.path)
        if kept is not None:
            draft.metrics |= _rewrite_tokenizer(config, source.path, draft.path, kept)
    return Artifact.open(out, expect="checkpoint")


def prune_model(
    config: PruneConfig, model: "PreTrainedModel", blocks: NDArray[np.int64]
) -> dict[str, Any]:
    """Prune ``model`` in place through ModelOpt's ``mtp.prune`` and return measurements.

    ``blocks`` are token ids ``[blocks, tokens]``.

    Raises:
        TrtKdError: if the model, the sizes or its activations are unfit.
    """
    with warnings.catch_warnings():
        # ModelOpt compiles functions on import in a way that torch calls deprecated.
        warnings.filterwarnings("ignore", message=r"`torch\.jit", category=DeprecationWarning)
        mtp = require("modelopt.torch.prune", extra="compress")
        from trt_kd.pruning.hf_minitron import NAME, detach_state, model_shape

    shape = model_shape(model)
    planned = config.planned(shape)
    axes = [axis for axis in settled(config.axes, planned) if axis.unit != "tokens"]
    if not axes:
        return {}
    settings = {
        "axes": [axis.model_dump(mode="json") for axis in axes],
        "importance": config.importance.model_dump(mode="json"),
        "reconstruct": config.reconstruct.model_dump(mode="json") if config.reconstruct else None,
        "seed": config.seed,
    }
    sizes = {axis.constraint: getattr(planned, axis.shape_field) for axis in axes}
    pruned, result = mtp.prune(
        model,
        mode=[(NAME, settings)],
        constraints={"export_config": sizes},
        dummy_input=None,
        config={"forward_loop": partial(_forward_loop, blocks)},
    )
    detach_state(pruned)
    measured: dict[str, Any] = result["best"]
    return measured


def _drop_tokens(
    config: PruneConfig, model: "PreTrainedModel", source: Artifact, size: int
) -> NDArray[np.int64] | None:
    """Cut the vocabulary to ``size`` if an axis asks for it; return the ids kept, ascending."""
    import torch

    from trt_kd.pruning.tokenizer import cut_rules
    from trt_kd.pruning.vocabulary import VocabAxis, kept_tokens, used_tokens

    for axis in config.axes:
        if isinstance(axis, VocabAxis):
            architecture = architecture_of(model.config.model_type)
            rows = architecture.embedding(model).num_embeddings
            counts_V = used_tokens(_corpus(config), load_tokenizer(source.path), rows=rows)
            kept = kept_tokens(counts_V, cut_rules(source.path), size=size)
            axis.resized(size).cut(model, architecture, [torch.from_numpy(kept)])
            return kept
    return None


def _rewrite_tokenizer(
    config: PruneConfig, source: Path, out: Path, kept: NDArray[np.int64]
) -> dict[str, Any]:
    from trt_kd.pruning.tokenizer import rewrite_tokenizer, verify_tokenizer

    rewrite_tokenizer(source, out, kept.tolist())
    texts = _corpus(config)
    verify_tokenizer(source, out, kept.tolist(), texts)
    return {"kept_tokens": len(kept), "verified_texts": len(texts)}


def _corpus(config: PruneConfig) -> list[str]:
    """Every text of the data source: what the vocabulary has to serve."""
    return documents(config.data, "train") + documents(config.data, "heldout")


def _forward_loop(blocks: NDArray[np.int64], model: "nn.Module") -> None:
    """Run the trunk over all blocks; the vocabulary head is not needed."""
    from tqdm import tqdm

    for batch_BL in tqdm(list(_batches(blocks)), desc="scoring", disable=None):
        _run_trunk(model, batch_BL)


def _batches(blocks: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for first in range(0, len(blocks), _BATCH):
        yield blocks[first : first + _BATCH]


def _run_trunk(model: Any, batch_BL: NDArray[np.int64]) -> None:
    import torch

    tokens_BL = torch.from_numpy(batch_BL).to(model.device)
    model.base_model(input_ids=tokens_BL, use_cache=False)


def _on_accelerator(model: "PreTrainedModel") -> "PreTrainedModel":
    import torch

    if torch.cuda.is_available():
        cast("nn.Module", model).to("cuda")
    return model
