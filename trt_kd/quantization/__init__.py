"""Quantization formats of Model Optimizer.

To add one: write a class in a module here, add one line below.
"""

from typing import TYPE_CHECKING

from trt_kd.registry import Registry

if TYPE_CHECKING:
    from trt_kd.quantization.base import QuantizationFormat

FORMATS: Registry["type[QuantizationFormat]"] = Registry(
    "quantization format",
    {
        "fp8": "trt_kd.quantization.float8:Fp8",
        "int8_smoothquant": "trt_kd.quantization.int8:Int8SmoothQuant",
        "int8": "trt_kd.quantization.int8:Int8",
        "int4_awq": "trt_kd.quantization.int4:Int4Awq",
        "mixed": "trt_kd.quantization.mixed:Mixed",
        "recipe": "trt_kd.quantization.recipe:Recipe",
        "nvfp4": "trt_kd.quantization.nvfp4:Nvfp4",
    },
)
