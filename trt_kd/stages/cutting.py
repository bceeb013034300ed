"""Cut a loaded model: weights through Model Optimizer's ``mtp.prune``, then the vocabulary."""

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from trt_kd.architectures import architecture_of
from trt_kd.architectures.shape import read_shape, shape_from_config
from trt_kd.checkpoints import load_model, load_tokenizer, save_model, stored_dtype
from trt_kd.data.base import documents
from trt_kd.errors import VerificationError
from trt_kd.heap import kept_pages
from trt_kd.measuring.progress import progress
from trt_kd.optional import require
from trt_kd.pruning.sizes import settled, waypoints

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from trt_kd.pruning.base import Axis
    from trt_kd.pruning.scores import Scores
    from trt_kd.stages.prune import PruneConfig
    from trt_kd.stages.score import ScoreConfig

logger = logging.getLogger(__name__)

BATCH = 4
"""Calibration sequences that are run at once."""


@kept_pages()
def cut_checkpoint(
    config: "PruneConfig",
    source: Path,
    blocks: NDArray[np.int64],
    out: Path,
    *,
    scores: Path | None = None,
    measure: "Callable[[PreTrainedModel], dict[str, Any]] | None" = None,
) -> dict[str, Any]:
    """Prune the checkpoint ``source`` into ``out``, in its own dtype; return measurements.

    ``measure`` is shown the pruned model in float32 before it is written.

    Raises:
        TrtKdError: if the model or the sizes are unfit.
        VerificationError: if what is left differs from what was planned.
    """
    import torch

    shape = read_shape(source)
    planned = config.planned(shape)
    logger.info("loading %s parameters in float32", f"{shape.parameters:,}")
    model = on_accelerator(load_model(source, dtype="float32"))
    measured: dict[str, Any] = {"parameters_before": shape.parameters}
    measured |= prune_model(config, model, blocks, scores)
    kept = drop_tokens(config, model, source, planned.vocab)
    measured["parameters_after"] = parameters = model.num_parameters()
    measured["parameters_share"] = parameters / shape.parameters
    if parameters != planned.parameters:
        raise VerificationError(
            f"pruning left {parameters:,} parameters, planned were {planned.parameters:,}",
            hint="the model holds parts that its config.json does not tell of",
        )
    if measure is not None:
        measured |= measure(model)
    cast("nn.Module", model).to("cpu", getattr(torch, stored_dtype(source)))
    logger.info("writing %s parameters", f"{parameters:,}")
    save_model(model, out, tokenizer_from=source)
    if kept is not None:
        measured |= rewrite_tokenizer_of(config, source, out, kept)
    return measured


def prune_model(
    config: "PruneConfig",
    model: "PreTrainedModel",
    blocks: NDArray[np.int64],
    scores: Path | None = None,
) -> dict[str, Any]:
    """Prune ``model`` in place, round by round, and return measurements of the last round.

    ``blocks`` are token ids ``[blocks, tokens]``. ``scores`` is the folder of earlier scores of
    this model, which serve the first round.

    Raises:
        TrtKdError: if the model, the sizes or its activations are unfit.
    """
    with warnings.catch_warnings():
        # ModelOpt compiles functions on import in a way that torch calls deprecated.
        warnings.filterwarnings("ignore", message=r"`torch\.jit", category=DeprecationWarning)
        require("modelopt.torch.prune", extra="compress")
        from trt_kd.pruning.hf_minitron import model_shape

    shape = model_shape(model)
    axes = settled(config.axes, config.planned(shape))
    axes = [axis for axis in axes if axis.unit != "tokens"]
    measured: dict[str, Any] = {}
    kept = list(range(shape.layers))
    for round_axes in waypoints(axes, shape, config.rounds):
        measured = _prune_once(config, model, round_axes, blocks, scores)
        scores = None  # they are of the unpruned model
        if "kept_layers" in measured:
            kept = [kept[index] for index in measured["kept_layers"]]
            measured["kept_layers"] = kept
    return measured


def score_model(
    config: "ScoreConfig", model: "PreTrainedModel", blocks: NDArray[np.int64]
) -> "tuple[Scores, dict[str, Any]]":
    """Score what the axes of ``config`` could cut, in one pass over ``blocks``; and measurements.

    Raises:
        ModelError: if activations are not finite.
    """
    from trt_kd.pruning.engine import Request, score

    shape = shape_from_config(model.config.to_dict())
    request = Request(config.axes, config.importance, None, config.seed)
    started = time.perf_counter()
    scores = score(model, partial(forward_loop, blocks), request, shape)
    return scores, {
        "importance_pass_s": time.perf_counter() - started,
        "calibration_tokens": scores.tokens,
        "block_influence": list(scores.influence),
    }


def _prune_once(
    config: "PruneConfig",
    model: "PreTrainedModel",
    axes: "list[Axis]",
    blocks: NDArray[np.int64],
    scores: Path | None,
) -> dict[str, Any]:
    import modelopt.torch.prune as mtp

    from trt_kd.pruning.hf_minitron import NAME, detach_state, model_shape

    shape = model_shape(model)
    planned = shape
    for axis in axes:
        planned = axis.write(planned, axis.target(shape))
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
        config={"forward_loop": partial(forward_loop, blocks), "checkpoint": scores},
    )
    detach_state(pruned)
    measured: dict[str, Any] = result["best"]
    return measured


def drop_tokens(
    config: "PruneConfig", model: "PreTrainedModel", source: Path, size: int
) -> NDArray[np.int64] | None:
    """Cut the vocabulary to ``size`` if an axis asks for it; return the ids kept, ascending."""
    import torch

    from trt_kd.pruning.tokenizer import cut_rules
    from trt_kd.pruning.vocabulary import VocabAxis, kept_tokens, used_tokens

    for axis in config.axes:
        if isinstance(axis, VocabAxis):
            architecture = architecture_of(model.config.model_type)
            rows = architecture.embedding(model).num_embeddings
            counts_V = used_tokens(_corpus(config), load_tokenizer(source), rows=rows)
            rules = cut_rules(source)
            kept = kept_tokens(counts_V, rules, size, multiple_of=axis.multiple_of)
            axis.resized(size).cut(model, architecture, [torch.from_numpy(kept)])
            return kept
    return None


def rewrite_tokenizer_of(
    config: "PruneConfig", source: Path, out: Path, kept: NDArray[np.int64]
) -> dict[str, Any]:
    """Write the tokenizer of the ``kept`` ids into ``out`` and check it on the whole corpus."""
    from trt_kd.pruning.tokenizer import rewrite_tokenizer, verify_tokenizer

    rewrite_tokenizer(source, out, kept.tolist())
    texts = _corpus(config)
    verify_tokenizer(source, out, kept.tolist(), texts)
    return {"kept_tokens": len(kept), "verified_texts": len(texts)}


def _corpus(config: "PruneConfig") -> list[str]:
    """Every text of the data source: what the vocabulary has to serve."""
    return [*documents(config.data, "train"), *documents(config.data, "heldout")]


def forward_loop(blocks: NDArray[np.int64], model: "nn.Module") -> None:
    """Run the trunk over all blocks; the vocabulary head is not needed."""
    for batch_BL in progress(list(_batches(blocks)), "calibration text"):
        _run_trunk(model, batch_BL)


def _batches(blocks: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for first in range(0, len(blocks), BATCH):
        yield blocks[first : first + BATCH]


def _run_trunk(model: Any, batch_BL: NDArray[np.int64]) -> None:
    import torch

    tokens_BL = torch.from_numpy(batch_BL).to(model.device)
    model.base_model(input_ids=tokens_BL, use_cache=False)


def on_accelerator(model: "PreTrainedModel") -> "PreTrainedModel":
    """The model on the first GPU, where there is one."""
    import torch

    if torch.cuda.is_available():
        cast("nn.Module", model).to("cuda")
    return model
