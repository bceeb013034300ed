"""INT4 weights in blocks, scaled by what the activations need, alone or with FP8 inputs.

Source: Lin et al. 2023, AWQ (arXiv:2306.00978).
"""

from typing import Any, ClassVar, Literal

from trt_kd.architectures.shape import ModelShape
from trt_kd.quantization.base import QuantizationFormat, alignment_problems, preset


class Int4Awq(QuantizationFormat):
    """INT4 weights in blocks along the input, activations untouched.

    The export gives query, key and value one smoothing, and gate and up another, and rounds them
    anew: its weights are as close to the source's as before, but not the same ones.
    """

    kind: Literal["int4_awq"] = "int4_awq"
    block_size: Literal[64, 128] = 128
    """Weights that share one scale; every input width must be a multiple of it."""

    export_kl_limit_nats: ClassVar[float] = 0.02
    weight_bits: ClassVar[float] = 4.0
    weight_error_limit: ClassVar[float | None] = 0.25

    def check(self, shape: ModelShape) -> list[str]:
        """See the base class."""
        return alignment_problems(shape, self.block_size, why="the block size of int4_awq")

    def modelopt_config(self) -> dict[str, Any]:
        """See the base class."""
        return _with_blocks("INT4_AWQ_CFG", self.block_size)


class W4A8Awq(QuantizationFormat):
    """INT4 weights in blocks, widened to FP8 E4M3 for a product with FP8 inputs.

    A weight is rounded twice, to INT4 and, by one scale per tensor, to FP8.
    """

    kind: Literal["w4a8_awq"] = "w4a8_awq"
    block_size: Literal[64, 128] = 128
    """Weights that share one scale; every input width must be a multiple of it."""

    export_kl_limit_nats: ClassVar[float] = 0.02
    weight_bits: ClassVar[float] = 4.0
    weight_error_limit: ClassVar[float | None] = 0.25
    trainable: ClassVar[bool] = False

    def check(self, shape: ModelShape) -> list[str]:
        """See the base class."""
        return alignment_problems(shape, self.block_size, why="the block size of w4a8_awq")

    def modelopt_config(self) -> dict[str, Any]:
        """See the base class."""
        return _with_blocks("W4A8_AWQ_BETA_CFG", self.block_size)


def _with_blocks(name: str, size: int) -> dict[str, Any]:
    """Preset ``name`` with blocks of ``size`` weights along the input."""
    config = preset(name)
    for entry in config["quant_cfg"]:
        settings = entry.get("cfg") or {}
        for one in settings if isinstance(settings, list) else [settings]:
            if blocks := one.get("block_sizes"):
                blocks[-1] = size
    return config
