"""TensorRT-LLM in this process: its LLM API with the PyTorch backend, 1.0 and after."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import ClassVar, Literal

from trt_kd.architectures.shape import read_shape
from trt_kd.backends.streaming import Engine, StreamingSession


class Trtllm(Engine):
    """TensorRT-LLM's LLM API on an NVIDIA GPU, bfloat16 or the format of the export."""

    package: ClassVar[str] = "tensorrt_llm"
    found_in: ClassVar[str] = "in the image of containers/trtllm.Dockerfile"

    kind: Literal["trtllm"] = "trtllm"

    def load(self, directory: Path) -> "TrtllmSession":
        """See the base class."""
        self.check()
        from tensorrt_llm import LLM
        from tensorrt_llm.llmapi import KvCacheConfig

        limits = {} if self.context_tokens is None else {"max_seq_len": self.context_tokens}
        engine = LLM(
            model=str(directory),
            dtype="bfloat16",
            tensor_parallel_size=self.tensor_parallel,
            kv_cache_config=KvCacheConfig(
                enable_block_reuse=False, free_gpu_memory_fraction=self.memory_share
            ),
            **limits,
        )
        return TrtllmSession(self.kind, engine, read_shape(directory).vocab)


class TrtllmSession(StreamingSession):
    """A running LLM of the LLM API."""

    async def stream(self, prompt: list[int], new_tokens: int) -> AsyncIterator[int]:
        """See the base class."""
        from tensorrt_llm import SamplingParams

        sampling = SamplingParams(
            max_tokens=new_tokens,
            top_k=1,
            ignore_eos=True,
            detokenize=False,
        )
        answer = self._engine.generate_async(prompt, sampling, streaming=True)
        async for output in answer:
            yield len(output.outputs[0].token_ids)  # all so far, not the new ones alone
