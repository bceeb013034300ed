"""NVFP4: 4-bit floats in blocks of 16 with FP8 scales, for Blackwell GPUs."""

from typing import Any, ClassVar, Literal

from trt_kd.architectures.shape import ModelShape
from trt_kd.artifacts.environment import environment
from trt_kd.quantization.base import QuantizationFormat, alignment_problems, preset


class Nvfp4(QuantizationFormat):
    """NVFP4 weights and activations; calibration needs a CUDA GPU."""

    kind: Literal["nvfp4"] = "nvfp4"

    export_kl_limit_nats: ClassVar[float] = 0.02
    weight_bits: ClassVar[float] = 4.5
    weight_error_limit: ClassVar[float | None] = None

    def check(self, shape: ModelShape) -> list[str]:
        """See the base class."""
        problems = alignment_problems(shape, 32, why="as NVFP4 matrix kernels want")
        if environment()["gpu"] is None:
            problems.append(
                "nvfp4 needs a CUDA GPU: Model Optimizer simulates it with CUDA kernels only, and "
                "this machine has none; choose fp8 or int8_smoothquant"
            )
        return problems

    def modelopt_config(self) -> dict[str, Any]:
        """See the base class."""
        return preset("NVFP4_DEFAULT_CFG")
