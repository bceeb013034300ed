"""The cache's settings; an unknown one is a TypeError, as in TensorRT-LLM."""

from dataclasses import dataclass


@dataclass
class KvCacheConfig:
    enable_block_reuse: bool = True
    free_gpu_memory_fraction: float | None = None
