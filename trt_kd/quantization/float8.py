"""FP8 E4M3 with scales per tensor, per channel and token, or per block.

Source: Micikevicius et al. 2022 (arXiv:2209.05433); blocks of 128 x 128 as in DeepSeek-AI 2024
(arXiv:2412.19437).
"""

from typing import Any, ClassVar, Literal

from trt_kd.architectures.shape import ModelShape
from trt_kd.quantization.base import QuantizationFormat, alignment_problems, preset

_BLOCK = 128


class _Fp8Format(QuantizationFormat):
    """What the formats have in common."""

    export_kl_limit_nats: ClassVar[float] = 0.02
    weight_bits: ClassVar[float] = 8.0
    weight_error_limit: ClassVar[float | None] = 0.05

    def check(self, shape: ModelShape) -> list[str]:
        """See the base class."""
        return alignment_problems(shape, 16, why="as FP8 matrix kernels want")


class Fp8(_Fp8Format):
    """Weights and activations of every projection in FP8 E4M3, static scales per tensor.

    On SmolLM2-135M quantization costs 0.037 nats. Its export is 0.031 nats from the simulated
    model, but no further from the source (0.039): it rounds some bfloat16 weights to the other
    neighbour.
    """

    kind: Literal["fp8"] = "fp8"

    def modelopt_config(self) -> dict[str, Any]:
        """See the base class."""
        return preset("FP8_DEFAULT_CFG")


class Fp8PerChannelPerToken(_Fp8Format):
    """FP8 E4M3 with a scale per output channel of a weight and one per token, found when it comes.

    Nothing of the inputs is calibrated, so that no outlier of other text can be cut off.
    """

    kind: Literal["fp8_per_channel_per_token"] = "fp8_per_channel_per_token"

    def modelopt_config(self) -> dict[str, Any]:
        """See the base class."""
        return preset("FP8_PER_CHANNEL_PER_TOKEN_CFG")


class Fp8Block(_Fp8Format):
    """Weights in FP8 E4M3 with a scale per block of 128 x 128; inputs as they are when simulated.

    Runtimes that multiply in FP8 round inputs too, per token and 128 features, as they come.
    """

    kind: Literal["fp8_block"] = "fp8_block"

    trainable: ClassVar[bool] = False

    def check(self, shape: ModelShape) -> list[str]:
        """See the base class."""
        why = f"the block size of {self.kind}"
        outputs = {
            "q_proj": shape.heads * shape.head_dim,
            "k_proj, v_proj": shape.kv_heads * shape.head_dim,
        }
        return alignment_problems(shape, _BLOCK, why=why) + [
            f"the output width {width} of {name} is no multiple of {_BLOCK}, {why}"
            for name, width in outputs.items()
            if width % _BLOCK
        ]

    def modelopt_config(self) -> dict[str, Any]:
        """See the base class."""
        return preset("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG")
