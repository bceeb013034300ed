"""Exporters: from a checkpoint or a quantized model to what a runtime serves.

To add one: write a module here, add one line below.
"""

from typing import TYPE_CHECKING

from trt_kd.registry import Registry

if TYPE_CHECKING:
    from trt_kd.exporters.base import Exporter

EXPORTERS: Registry["type[Exporter]"] = Registry(
    "exporter",
    {
        "hf-unified": "trt_kd.exporters.hf_unified:HfUnified",
        "onnx": "trt_kd.exporters.onnx:Onnx",
        "ort-genai": "trt_kd.exporters.ort_genai:OrtGenai",
        "tensorrt-rtx": "trt_kd.exporters.tensorrt_rtx:TensorrtRtx",
        "trtllm-checkpoint": "trt_kd.exporters.trtllm_checkpoint:TrtllmCheckpoint",
        "trtllm-engine": "trt_kd.exporters.trtllm_engine:TrtllmEngine",
    },
)
