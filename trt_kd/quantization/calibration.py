"""Calibrate a model with Model Optimizer and look at what came out.

Shape suffixes: N blocks, L tokens of a block.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trt_kd.errors import ModelError
from trt_kd.measuring.progress import progress
from trt_kd.quantization.base import QuantizationFormat
from trt_kd.quantization.mixed import Mixed
from trt_kd.quantization.modelopt import modelopt, quiet

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

_BATCH = 4


def calibrate(
    model: "PreTrainedModel", quantization: QuantizationFormat, blocks_NL: np.ndarray
) -> dict[str, Any]:
    """Quantize ``model`` in place, with scales from a forward pass over every block.

    Returns what a reader needs beside the settings: of a search, ``chosen``, the label of the
    format of every projection.

    Raises:
        ModelError: if a scale is missing, zero or not finite afterwards, or a search finds nothing.
    """
    import torch

    batches = [
        torch.as_tensor(blocks_NL[start : start + _BATCH], device=model.device)
        for start in range(0, len(blocks_NL), _BATCH)
    ]
    kept = quantization.kept()
    if isinstance(quantization, Mixed):
        from trt_kd.quantization.searching import search

        kept["chosen"] = search(model, quantization, batches)
    else:
        _calibrate_all(model, quantization, batches)
    if settings := quantization.cache_settings():
        _calibrate_cache(model, settings, batches)
    check_scales(model)
    return kept


def _calibrate_all(
    model: "PreTrainedModel", quantization: QuantizationFormat, batches: "Sequence[Tensor]"
) -> None:
    """Quantize every projection in one format."""
    mtq = modelopt("quantization")
    with quiet():
        mtq.quantize(model, quantization.modelopt_config(), _forward_loop(batches, "calibrate"))


def _calibrate_cache(
    model: "PreTrainedModel", settings: list[dict[str, Any]], batches: "Sequence[Tensor]"
) -> None:
    """Find the ranges of keys and values, all projections computing unquantized meanwhile.

    Raises:
        ModelError: if an attention layer has no place for the quantizers.
    """
    mtq = modelopt("quantization")
    alone = [{"quantizer_name": "*", "enable": False}, *settings]
    with quiet():
        mtq.set_quantizer_by_cfg(model, settings)
        with mtq.set_quantizer_by_cfg_context(model, alone):
            mtq.calibrate(model, "max", _forward_loop(batches, "calibrate the cache"))
    found = sum(q.is_enabled for name, q in quantizers(model) if name.endswith("_bmm_quantizer"))
    expected = 2 * model.config.num_hidden_layers
    if found != expected:
        raise ModelError(
            f"Model Optimizer quantizes {found} of the {expected} keys and values of this "
            f"{model.config.model_type} model",
            hint="quantize it with kv_cache=none",
        )


def _forward_loop(batches: "Sequence[Tensor]", what: str) -> "Callable[[PreTrainedModel], None]":
    """A function that runs a model over ``batches``."""
    import torch

    def forward_loop(network: "PreTrainedModel") -> None:
        with torch.inference_mode():
            for ids_BL in progress(batches, what):
                network(ids_BL, use_cache=False, logits_to_keep=1)  # the head is never quantized

    return forward_loop


def check_scales(model: "nn.Module") -> None:
    """Check that every enabled quantizer holds a usable scale.

    Model Optimizer itself exports a model that nothing was run through, with made-up scales or
    none. An output channel whose weights are all zero may have the scale zero.

    Raises:
        ModelError: naming the first quantizer without one, or if nothing is quantized at all.
    """
    enabled = 0
    for name, quantizer in quantizers(model):
        if not quantizer.is_enabled or getattr(quantizer, "_dynamic", False):
            continue
        enabled += 1
        amax = getattr(quantizer, "_amax", None)
        if amax is None:
            raise ModelError(
                f"{name} has no scale after calibration",
                hint="its layer saw no token: give more calibration text",
            )
        if not bool(amax.isfinite().all()) or float(amax.max()) <= 0:
            raise ModelError(
                f"{name} has a scale that is zero or not finite",
                hint="the model's weights or activations overflow or vanish there: "
                "evaluate the source, or keep it in float32",
            )
    if not enabled:
        raise ModelError(
            "no layer was quantized", hint="the format's patterns match no layer of this model"
        )


def quantizers(model: "nn.Module") -> Iterator[tuple[str, Any]]:
    """Every tensor quantizer of ``model`` with its dotted name."""
    nodes = modelopt("quantization.nn")
    for name, module in model.named_modules():
        if isinstance(module, nodes.TensorQuantizer):
            yield name, module
