"""INT4 weights in blocks, scaled by what the activations need.

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
    weight_error_limit: ClassVar[float | None] = None

    def check(self, shape: ModelShape) -> list[str]:
        """See the base class."""
        return alignment_problems(shape, self.block_size, why="the block size of int4_awq")

    def modelopt_config(self) -> dict[str, Any]:
        """See the base class."""
        config = preset("INT4_AWQ_CFG")
        for entry in config["quant_cfg"]:
            blocks = (entry.get("cfg") or {}).get("block_sizes")
            if blocks:
                blocks[-1] = self.block_size
        return config
