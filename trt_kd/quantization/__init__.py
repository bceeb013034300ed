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
        "fp8_per_channel_per_token": "trt_kd.quantization.float8:Fp8PerChannelPerToken",
        "fp8_block": "trt_kd.quantization.float8:Fp8Block",
        "int8_smoothquant": "trt_kd.quantization.int8:Int8SmoothQuant",
        "int8": "trt_kd.quantization.int8:Int8",
        "int4_awq": "trt_kd.quantization.int4:Int4Awq",
        "w4a8_awq": "trt_kd.quantization.int4:W4A8Awq",
        "mixed": "trt_kd.quantization.mixed:Mixed",
        "recipe": "trt_kd.quantization.recipe:Recipe",
        "nvfp4": "trt_kd.quantization.nvfp4:Nvfp4",
    },
)
