"""Settings of an engine; an unknown one is a TypeError, as in vLLM."""

from dataclasses import dataclass


@dataclass
class AsyncEngineArgs:
    model: str
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    enable_prefix_caching: bool | None = None
