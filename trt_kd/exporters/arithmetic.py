"""The arithmetic of deployed low-bit layers, written from the formats' definitions alone.

It shares no code with Model Optimizer, so that it can witness what Model Optimizer wrote.

Shape suffixes: O output and I input features, G blocks along the input.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

E4M3_MAX = 448.0


def fp8_weight(weight_OI: Tensor, scale: Tensor) -> Tensor:
    """FP8 E4M3 codes times one scale, in float32."""
    return weight_OI.float() * scale.float()


def fp8_channel_weight(weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    """FP8 E4M3 codes times one scale per output channel, in float32."""
    return weight_OI.float() * scale_O.float()[:, None]


def fp8_block_weight(weight_OI: Tensor, scale: Tensor, block: int = 128) -> Tensor:
    """FP8 E4M3 codes times one scale per square block, in float32.

    ``scale`` is ``[O/block, I/block]``, dimensions of one added or left out.
    """
    outputs, inputs = weight_OI.shape
    scale_RC = scale.float().reshape(outputs // block, inputs // block)
    return weight_OI.float() * scale_RC.repeat_interleave(block, 0).repeat_interleave(block, 1)


def int4_fp8_weight(packed: Tensor, scale_OG: Tensor, scale_2: Tensor) -> Tensor:
    """INT4 codes times one scale per block, rounded to FP8 E4M3 by one more scale, in float32."""
    return fp8_input(int4_weight(packed, scale_OG), scale_2.float())


def int8_weight(weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    """INT8 codes times one scale per output channel, in float32."""
    return weight_OI.float() * scale_O.float()[:, None]


def int4_weight(packed: Tensor, scale_OG: Tensor) -> Tensor:
    """INT4 codes times one scale per block, in float32.

    ``packed`` is ``[O/2, I]`` uint8: the low half of byte ``[r, i]`` is the code of output
    ``2r``, the high half that of ``2r + 1``, both in two's complement.
    """
    pairs = torch.stack([packed & 15, packed >> 4], dim=1).to(torch.int8)
    codes_OI = torch.where(pairs > 7, pairs - 16, pairs).reshape(-1, packed.shape[1]).float()
    block = codes_OI.shape[1] // scale_OG.shape[1]
    return codes_OI * scale_OG.float().repeat_interleave(block, dim=1)


def fp8_input(x: Tensor, scale: Tensor) -> Tensor:
    """Round ``x`` to FP8 E4M3 with a static scale and back."""
    codes = (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.float() * scale


def fp8_token_input(x: Tensor) -> Tensor:
    """Round ``x`` ``[..., I]`` to FP8 E4M3 and back, each token with a scale of its own."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return fp8_input(x, scale / E4M3_MAX)


def int8_input(x: Tensor, scale: Tensor) -> Tensor:
    """Round ``x`` to INT8 with a static scale and back."""
    return (x.float() / scale).round().clamp(-128, 127) * scale


class DeployedLinear(nn.Module):
    """A linear layer that rounds its input as the deployed kernel does."""

    weight: Tensor
    bias: Tensor | None
    pre_quant_scale: Tensor | None

    def __init__(
        self,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        *,
        pre_quant_scale_I: Tensor | None,
        round_input: Callable[[Tensor], Tensor] | None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight_OI)
        self.register_buffer("bias", bias_O)
        self.register_buffer("pre_quant_scale", pre_quant_scale_I)
        self._round_input = round_input

    def forward(self, x: Tensor) -> Tensor:
        """Scale, round and multiply; ``x`` is ``[..., I]``."""
        if self.pre_quant_scale is not None:
            x = x * self.pre_quant_scale
        if self._round_input is not None:
            x = self._round_input(x)
        return F.linear(x, self.weight, self.bias)
