"""Make a calibrated model trainable, and a quantized one again of what was trained.

Fake quantizers pass gradients straight through their rounding (Bengio et al. 2013,
arXiv:1308.3432), as quantization-aware training does (Jacob et al. 2017, arXiv:1712.05877). While
it trains every scale stays where calibration left it; afterwards those of the weights follow them.
"""

from typing import TYPE_CHECKING

import torch

from trt_kd.quantization.calibration import quantizers
from trt_kd.quantization.modelopt import modelopt

if TYPE_CHECKING:
    from torch import Tensor, nn

_WEIGHT = ".weight_quantizer"


def make_trainable(model: "nn.Module") -> None:
    """Let gradients reach every weight of the calibrated ``model``, in place.

    Model Optimizer's own state is taken off: a trainer would pickle it into its checkpoints, and
    what it says stands in the settings.
    """
    for _, quantizer in quantizers(model):
        for name, value in quantizer.named_buffers(recurse=False):
            setattr(quantizer, name, value.clone())  # calibration leaves tensors of inference mode
    modelopt("opt").ModeloptStateManager.remove_state(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def settle(model: "nn.Module", dtype: torch.dtype) -> None:
    """Cast what was trained to ``dtype``, in place, and take the scales of the weights anew.

    Buffers of the stock model, such as rotary frequencies, keep their precision.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        for _, quantizer in quantizers(model):
            for name, value in quantizer.named_buffers(recurse=False):
                if value.is_floating_point():
                    setattr(quantizer, name, value.to(dtype))
        refit_weights(model)


def refit_weights(model: "nn.Module") -> None:
    """Set every static scale of a weight to what the weight needs now; the others stay."""
    for name, quantizer in quantizers(model):
        if not name.endswith(_WEIGHT) or not quantizer.is_enabled:
            continue
        if getattr(quantizer, "_dynamic", False):
            continue
        weight = model.get_parameter(name.removesuffix(_WEIGHT) + ".weight")
        quantizer.reset_amax()
        quantizer.disable_quant()
        quantizer.enable_calib()
        with torch.no_grad():
            quantizer(weight)
        quantizer.load_calib_amax()
        quantizer.disable_calib()
        quantizer.enable_quant()


def stock_weights(model: "nn.Module") -> "dict[str, Tensor]":
    """Weights by name as a model without quantizers has them: the smoothing taken out again.

    A smoothed layer computes ``x * s`` times a weight that was divided by ``s``.
    """
    factors = {
        name.removesuffix(".input_quantizer") + ".weight": quantizer.pre_quant_scale
        for name, quantizer in quantizers(model)
        if name.endswith(".input_quantizer") and quantizer.pre_quant_scale is not None
    }
    found = {}
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if name in factors:
            weight = (weight.float() * factors[name].float().reshape(1, -1)).to(weight.dtype)
        found[name] = weight
    return found
