"""Keep a calibrated model without pickle: the source's files and one file of quantizer state.

``quantizers.safetensors`` holds the tensors of every quantizer, and the weights that calibration
changed (smoothing moves scales into them); all else is the source's, byte for byte, but for the
weights of a model that was trained in its quantizers.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_kd.artifacts import Artifact
from trt_kd.checkpoints import load_model, save_model
from trt_kd.config import build_plugin
from trt_kd.errors import ModelError
from trt_kd.quantization import FORMATS
from trt_kd.quantization.base import QuantizationFormat
from trt_kd.quantization.calibration import quantizers
from trt_kd.quantization.modelopt import modelopt, quiet

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

QUANTIZERS = "quantizers.safetensors"
_ATTRIBUTES = ("_amax_for_smoothing",)


def save_quantized(
    model: "PreTrainedModel", source: Artifact, out: Path, kept: Mapping[str, Any]
) -> None:
    """Write the calibrated ``model``, made from the checkpoint ``source``, to ``out``.

    ``kept`` is what ``calibrate`` returned.
    """
    for name in source.manifest.files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.path / name, out / name)
    _save_state(model, out, kept)


def save_trained(model: "PreTrainedModel", calibrated: Artifact, out: Path) -> None:
    """Write to ``out`` a ``model`` restored from ``calibrated`` and trained in its quantizers.

    Its own weights take the place of the source's, without the smoothing: again a stock checkpoint.

    Raises:
        ModelError: if what was kept of the calibration cannot be read.
    """
    import torch

    from trt_kd.quantization.training import stock_weights

    told, _ = _read_state(calibrated.path)
    plain, weights = load_model(calibrated.path), stock_weights(model)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(weights[name])
    save_model(plain, out, tokenizer_from=calibrated.path)
    _save_state(model, out, told["kept"])


def _save_state(model: "PreTrainedModel", out: Path, kept: Mapping[str, Any]) -> None:
    """Write what the quantizers hold, and what the checkpoint in ``out`` does not, beside it."""
    from safetensors.torch import save_file

    state = _changed_weights(model, out)
    promoted = []
    for name, quantizer in quantizers(model):
        tensors = dict(quantizer.named_buffers(recurse=False))
        tensors |= {a: getattr(quantizer, a) for a in _ATTRIBUTES if hasattr(quantizer, a)}
        state |= {f"{name}.{key}": value.detach().contiguous() for key, value in tensors.items()}
        if type(quantizer).__name__ == "StaticBlockScaleQuantizer":
            promoted.append(name)
    told = {"static_block_scale": promoted, "kept": dict(kept)}
    metadata = {"state": json.dumps(told)}  # one key: their order is random
    copies = {name: tensor.cpu().clone() for name, tensor in state.items()}
    save_file(copies, out / QUANTIZERS, metadata)


def _changed_weights(model: "PreTrainedModel", source: Path) -> dict[str, "Tensor"]:
    """Parameters of ``model`` that are not, in its dtype, what the files of ``source`` hold."""
    import torch
    from safetensors import safe_open

    unseen = dict(model.named_parameters())
    changed: dict[str, Tensor] = {}
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            for name in sorted(set(names) & set(unseen)):
                weight = unseen.pop(name).detach()
                if not torch.equal(weight, file.get_tensor(name).to(weight)):
                    changed[name] = weight.contiguous()
    if not unseen:
        return changed
    stored = dict(load_model(source).named_parameters())  # experts have other names in the files
    for name, parameter in unseen.items():
        weight = parameter.detach()
        if name not in stored or not torch.equal(weight, stored[name].detach().to(weight)):
            changed[name] = weight.contiguous()
    return changed


def format_of(artifact: Artifact) -> QuantizationFormat:
    """Format that a quantized artifact was made in.

    Raises:
        ConfigError: if the format is unknown here.
    """
    plugin = build_plugin(FORMATS, artifact.manifest.config["format"])  # type: ignore[arg-type]
    return plugin  # type: ignore[return-value]


def load_quantized(directory: Path, *, dtype: str | None = None) -> "PreTrainedModel":
    """Restore the fake-quantized model in the quantized artifact ``directory``.

    With ``dtype`` None its logits equal the calibrated model's bit for bit; another dtype, by its
    torch name, computes the same arithmetic in that precision.

    Raises:
        ArtifactError: if the directory is no quantized artifact.
        ModelError: if the quantizers' state is damaged or does not fit the model.
    """
    import torch

    mtq = modelopt("quantization")
    artifact = Artifact.open(directory, expect="quantized")
    told, state = _read_state(directory)
    model = load_model(directory, dtype=dtype)
    quantization = format_of(artifact)
    settings = quantization.restored_config(told["kept"])
    settings["quant_cfg"] = [*settings["quant_cfg"], *quantization.cache_settings()]
    with quiet():
        mtq.quantize(model, settings)
    if dtype is not None:
        target = getattr(torch, dtype)
        state = {k: v.to(target) if v.is_floating_point() else v for k, v in state.items()}
    _restore(model, state, told["static_block_scale"])
    with torch.inference_mode():  # block quantizers settle their shapes on first use
        model(torch.zeros(1, 1, dtype=torch.long), use_cache=False)
    return model


def _read_state(directory: Path) -> "tuple[dict[str, Any], dict[str, Tensor]]":
    """What the quantizers' file tells, and its tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(directory / QUANTIZERS, framework="pt") as file:
            told = json.loads((file.metadata() or {})["state"])
            names = file.keys()
            return told, {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ModelError(
            f"{directory / QUANTIZERS} cannot be read: {error}", hint="quantize the model again"
        ) from error


def _restore(model: "nn.Module", state: dict[str, "Tensor"], promoted: list[str]) -> None:
    """Put every tensor of ``state`` where it was, and see that none is left over."""
    import torch

    nodes = modelopt("quantization.nn")
    modules: dict[str, Any] = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    for name, tensor in state.items():
        owner, _, attribute = name.rpartition(".")
        if name in parameters:
            with torch.no_grad():
                parameters[name].copy_(tensor)
        elif not isinstance(modules.get(owner), nodes.TensorQuantizer):
            raise ModelError(
                f"{QUANTIZERS} holds {name}, which this model does not have",
                hint="quantize the model again with the installed Model Optimizer",
            )
        elif attribute in _ATTRIBUTES:
            setattr(modules[owner], attribute, tensor)
        else:
            modules[owner].register_buffer(attribute, tensor)
    for name in promoted:
        nodes.StaticBlockScaleQuantizer.from_tensor_quantizer(modules[name])
