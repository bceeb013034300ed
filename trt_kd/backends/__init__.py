"""Backends: runtimes that load one model, give its logits and decode with it.

Load generators: tools that measure a runtime by a clock of their own. To add one of either: write
a module here, add one line below.
"""

from typing import TYPE_CHECKING

from trt_kd.registry import Registry

if TYPE_CHECKING:
    from trt_kd.backends.base import Backend
    from trt_kd.backends.load import LoadGenerator

BACKENDS: Registry["type[Backend]"] = Registry(
    "backend",
    {
        "transformers": "trt_kd.backends.transformers:TransformersBackend",
        "ort-genai": "trt_kd.backends.ort_genai:OrtGenai",
        "onnxruntime": "trt_kd.backends.onnxruntime:OnnxRuntime",
        "trtllm": "trt_kd.backends.trtllm:Trtllm",
        "vllm": "trt_kd.backends.vllm:Vllm",
        "hf-unified": "trt_kd.exporters.hf_unified_reader:HfUnifiedReader",
        "trtllm-checkpoint": "trt_kd.exporters.trtllm_reader:TrtllmReader",
    },
)

LOAD_GENERATORS: Registry["type[LoadGenerator]"] = Registry(
    "load generator",
    {
        "trtllm-bench": "trt_kd.backends.trtllm_bench:TrtllmBench",
        "openai-server": "trt_kd.backends.openai_server:OpenaiServer",
    },
)
