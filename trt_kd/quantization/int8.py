"""INT8 weights and activations, plain or smoothed.

Source: Xiao et al. 2022, SmoothQuant (arXiv:2211.10438).
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from trt_kd.architectures.shape import ModelShape
from trt_kd.quantization.base import QuantizationFormat, alignment_problems, preset


class Int8SmoothQuant(QuantizationFormat):
    """INT8 per output channel for weights, per tensor for activations smoothed into them.

    On SmolLM2-135M quantization costs 0.11 nats, and the export is 0.006 from the simulated model.
    """

    kind: Literal["int8_smoothquant"] = "int8_smoothquant"
    alpha: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the activations' range moved into the weights; 1, Model Optimizer's default, moves
    all of it. At 0.5, the paper's, quantization of SmolLM2-135M costs 0.30 nats."""

    export_kl_limit_nats: ClassVar[float] = 0.02
    weight_bits: ClassVar[float] = 8.0
    weight_error_limit: ClassVar[float | None] = 0.1

    def check(self, shape: ModelShape) -> list[str]:
        """See the base class."""
        return alignment_problems(shape, 16, why="as INT8 matrix kernels want")

    def modelopt_config(self) -> dict[str, Any]:
        """See the base class."""
        algorithm = {"method": "smoothquant", "alpha": self.alpha}
        return preset("INT8_SMOOTHQUANT_CFG") | {"algorithm": algorithm}


class Int8(QuantizationFormat):
    """INT8 per output channel for weights, per tensor for activations, not smoothed.

    The baseline that smoothing is measured against: on SmolLM2-135M it costs 0.95 nats.
    """

    kind: Literal["int8"] = "int8"

    export_kl_limit_nats: ClassVar[float] = 0.02
    weight_bits: ClassVar[float] = 8.0
    weight_error_limit: ClassVar[float | None] = 0.1

    def check(self, shape: ModelShape) -> list[str]:
        """See the base class."""
        return alignment_problems(shape, 16, why="as INT8 matrix kernels want")

    def modelopt_config(self) -> dict[str, Any]:
        """See the base class."""
        return preset("INT8_DEFAULT_CFG")
