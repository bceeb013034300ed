"""Read a unified Hugging Face checkpoint and compute what a deployed kernel computes.

The stock architecture is built from ``config.json``, its experts one by one as the files hold them,
the tensors are read and dequantized here, and activations are rounded with the static scales of the
file. Model Optimizer is not involved: this is the witness of what it wrote.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trt_kd.architectures import ARCHITECTURES, architecture_of
from trt_kd.backends.base import Backend, Session
from trt_kd.checkpoints import read_json
from trt_kd.errors import ModelError
from trt_kd.exporters.hf_unified_files import (
    Quantization,
    Tensors,
    is_cache_scale,
    open_tensors,
    read_quantization,
)
from trt_kd.optional import require

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

_SCALES = ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")


class HfUnifiedReader(Backend):
    """Deployed FP8, INT8 and INT4 arithmetic of a unified checkpoint, simulated in float32."""

    kind: Literal["hf-unified"] = "hf-unified"

    def load(self, directory: Path) -> Session:
        """See the base class."""
        torch = require("torch", extra="compress")
        from trt_kd.backends.transformers import TransformersSession

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return TransformersSession(read_model(directory))


def read_model(directory: Path) -> "PreTrainedModel":
    """Build the model in ``directory`` with deployed arithmetic, in float32 on the CPU.

    Raises:
        ModelError: if tensors are missing, left over or misshapen, a projection is quantized
            that should not be, or the other way round, or a scale is not positive.
    """
    quantization = read_quantization(directory)
    config = read_json(directory / "config.json")
    model: Any = empty_model(config, directory)
    stored: Callable[[str], str] = str
    if config["model_type"] in ARCHITECTURES.names():
        architecture = architecture_of(config["model_type"])
        stored = architecture.stored
        if architecture.expert_projections is not None:
            from trt_kd.exporters.listed_experts import list_experts

            list_experts(model, architecture.expert_projections)
    with open_tensors(directory) as tensors:
        left = set(tensors)
        if quantization is not None:
            left -= _place_quantized(model, tensors, quantization, stored)
            left -= {name for name in left if quantization.kv_cache and is_cache_scale(name)}
        _place_plain(model, tensors, left, stored, directory)
    return model.eval()  # type: ignore[no-any-return]


def weight_of(tensors: Tensors, module: str, algorithm: str) -> "Tensor":
    """Dequantized weight of the quantized projection ``module``, in float32.

    Raises:
        ModelError: if a tensor is absent or of the wrong shape.
    """
    from trt_kd.exporters import arithmetic

    known: Mapping[str, Callable[..., Tensor]] = {
        "FP8": arithmetic.fp8_weight,
        "FP8_PER_CHANNEL_PER_TOKEN": arithmetic.fp8_channel_weight,
        "fp8_pb_wo": arithmetic.fp8_block_weight,
        "W8A8_SQ_PER_CHANNEL": arithmetic.int8_weight,
        "W4A16_AWQ": arithmetic.int4_weight,
        "W4A8_AWQ": arithmetic.int4_fp8_weight,
    }
    parts = ["weight", "weight_scale", *(["weight_scale_2"] if algorithm == "W4A8_AWQ" else [])]
    try:
        return known[algorithm](*(tensors[f"{module}.{part}"] for part in parts))
    except KeyError as error:
        raise ModelError(f"tensor {error.args[0]} is missing") from error
    except (RuntimeError, IndexError) as error:
        raise ModelError(f"the scales of {module} do not fit its weight: {error}") from error


def empty_model(config: Mapping[str, Any], directory: Path) -> Any:
    """Build the stock architecture; its parameters hold no memory yet."""
    require("transformers", extra="compress")
    import torch
    from accelerate import init_empty_weights
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    if plain.get("model_type") not in CONFIG_MAPPING:
        raise ModelError(f"{directory}: unknown model_type {plain.get('model_type')!r}")
    settings = CONFIG_MAPPING[plain["model_type"]].from_dict(plain)
    builder: Any = AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):
        return builder.from_config(settings, dtype=torch.float32)


def _place_quantized(
    model: "nn.Module",
    tensors: Tensors,
    quantization: Quantization,
    stored: Callable[[str], str],
) -> set[str]:
    """Replace every quantized projection; return the names of the tensors used."""
    from torch import nn

    used: set[str] = set()
    for place, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        name = stored(place)
        scaled = f"{name}.weight_scale" in tensors
        layer = quantization.of(name)
        if scaled != (layer is not None):
            said, found = ("quantized", "no") if not scaled else ("excluded", "a")
            raise ModelError(f"{name} is said to be {said}, but there is {found} weight scale")
        if layer is not None:
            parent, _, child = place.rpartition(".")
            replacement = _deployed(module, name, tensors, layer.algorithm)
            setattr(model.get_submodule(parent), child, replacement)
            used |= {f"{name}.{part}" for part in ("weight", "bias", *_SCALES)} & set(tensors)
    return used


def _deployed(module: "nn.Linear", name: str, tensors: Tensors, algorithm: str) -> "nn.Module":
    from trt_kd.exporters import arithmetic

    weight = weight_of(tensors, name, algorithm)
    if tuple(weight.shape) != (module.out_features, module.in_features):
        raise ModelError(f"{name}.weight has shape {tuple(weight.shape)}, not the configuration's")
    parts = {
        part: tensors[f"{name}.{part}"].float()
        for part in ("bias", *_SCALES)
        if f"{name}.{part}" in tensors
    }
    for part in _SCALES:
        if part in parts and not bool(((parts[part] > 0) & parts[part].isfinite()).all()):
            raise ModelError(f"{name}.{part} is not a positive number everywhere")
    rounds = {
        "FP8": arithmetic.fp8_input,
        "W8A8_SQ_PER_CHANNEL": arithmetic.int8_input,
        "W4A8_AWQ": arithmetic.fp8_input,
    }
    round_input: Callable[[Tensor], Tensor] | None = None
    if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
        round_input = arithmetic.fp8_token_input
    elif algorithm in rounds:
        if "input_scale" not in parts:
            raise ModelError(f"tensor {name}.input_scale is missing")
        round_input = partial(rounds[algorithm], scale=parts["input_scale"])
    return arithmetic.DeployedLinear(
        weight,
        parts.get("bias"),
        pre_quant_scale_I=parts.get("pre_quant_scale"),
        round_input=round_input,
    )


def _place_plain(
    model: Any, tensors: Tensors, left: set[str], stored: Callable[[str], str], directory: Path
) -> None:
    """Fill every other parameter from the tensors named ``left``; each is used once."""
    from torch import nn

    tied = bool(model.config.tie_word_embeddings)
    head, embedding = map(stored, _tables(model))
    places = {
        stored(place): (place, empty)
        for place, empty in model.named_parameters(remove_duplicate=False)
    }
    if tied and head not in left:
        places.pop(head, None)
    if missing := sorted(set(places) - left):
        raise ModelError(f"{directory}: tensor {missing[0]} is missing")
    if extra := sorted(left - set(places)):
        raise ModelError(f"{directory}: tensor {extra[0]} belongs to no part of the model")
    for name, (place, empty) in places.items():
        tensor = tensors[name]
        if tensor.shape != empty.shape or not tensor.is_floating_point():
            raise ModelError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not as configured")
        owner, _, attribute = place.rpartition(".")
        value = nn.Parameter(tensor.float(), requires_grad=False)
        setattr(model.get_submodule(owner), attribute, value)
    if tied:
        _tie(model, tensors, (head, embedding) if head in left else None, directory)


def _tables(model: Any) -> tuple[str, str]:
    """Names of the head's weight and of the embedding's."""
    names = {module: name for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return f"{names[head]}.weight", f"{names[embedding]}.weight"


def _tie(model: Any, tensors: Tensors, both: tuple[str, str] | None, directory: Path) -> None:
    """Let head and embedding be one; ``both`` are their names where the files hold both."""
    import torch

    if both is not None and not torch.equal(*(tensors[name] for name in both)):
        raise ModelError(
            f"{directory}: the head is said to be tied, but differs from the embedding"
        )
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
