"""Let Model Optimizer choose a format for every layer."""

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trt_kd.errors import ModelError
from trt_kd.quantization.base import label
from trt_kd.quantization.mixed import UNQUANTIZED, Mixed
from trt_kd.quantization.modelopt import modelopt, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HEAD = "*lm_head*"


def search(model: "PreTrainedModel", mixed: Mixed, batches: Sequence[Tensor]) -> dict[str, str]:
    """Quantize ``model`` in place; the label of the format chosen for every projection by name.

    ``batches`` are token ids ``[B, L]``. All of them calibrate, the first ones make the scores.

    Raises:
        ModelError: if the budget cannot be met.
    """
    mtq = modelopt("quantization")
    configs = {label(member): member.modelopt_config() for member in mixed.formats}
    scored = ceil(mixed.score_tokens / batches[0].numel())

    def forward_step(network: Any, ids_BL: Tensor) -> Tensor:
        logits_BLV: Tensor = network(input_ids=ids_BL, use_cache=False).logits
        return logits_BLV

    def loss_func(logits_BLV: Tensor, ids_BL: Tensor) -> Tensor:
        return F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1).float(), ids_BL[:, 1:].flatten())

    try:
        with quiet():
            _, found = mtq.auto_quantize(
                model,
                constraints={
                    "effective_bits": mixed.effective_bits,
                    "cost": {"excluded_module_name_patterns": [_HEAD]},
                },
                quantization_formats=list(configs.values()),
                data_loader=batches,
                forward_step=forward_step,
                loss_func=loss_func if mixed.method == "gradient" else None,
                disabled_layers=[_HEAD],
                num_calib_steps=len(batches),
                num_score_steps=min(scored, len(batches)),
                method=mixed.method,
            )
    except (ValueError, AssertionError) as error:
        raise ModelError(
            f"no choice of formats meets {mixed.effective_bits:g} bits: {error}",
            hint="raise effective_bits, or add a smaller format",
        ) from error
    if not found["best"]["is_satisfied"]:
        raise ModelError(
            f"no choice of formats meets {mixed.effective_bits:g} bits",
            hint="raise effective_bits, or add a smaller format",
        )
    model.zero_grad()
    return _chosen(found, configs)


def _chosen(found: dict[str, Any], configs: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Labels by module, from the state of the search; modules without a choice are left out."""
    recipes = modelopt("quantization.algorithms").QuantRecipe
    names = {recipes(config, name=name): name for name, config in configs.items()}
    return {
        module: names.get(recipe, UNQUANTIZED)
        for group, recipe in found["best"]["recipe"].items()
        if len(found["candidate_stats"][group]["formats"]) > 1
        for module in found["candidate_stats"][group]["module_names"]
    }


def effective_bits(model: torch.nn.Module, mixed: Mixed, chosen: dict[str, str]) -> float:
    """Bits per weight on average over the modules of ``chosen``."""
    sizes = {module: model.get_parameter(f"{module}.weight").numel() for module in chosen}
    total = sum(size * mixed.bits(chosen[module]) for module, size in sizes.items())
    return total / sum(sizes.values())
