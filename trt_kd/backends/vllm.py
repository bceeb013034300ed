"""vLLM in this process: its ``AsyncLLM`` engine, without a server in between."""

from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, Literal

from trt_kd.architectures.shape import read_shape
from trt_kd.backends.streaming import Engine, StreamingSession


class Vllm(Engine):
    """vLLM's AsyncLLM on an NVIDIA GPU, bfloat16 or the format of the export."""

    package: ClassVar[str] = "vllm"
    found_in: ClassVar[str] = "where it is, such as the image vllm/vllm-openai"

    kind: Literal["vllm"] = "vllm"

    def load(self, directory: Path) -> "VllmSession":
        """See the base class."""
        self.check()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(
            model=str(directory),
            dtype="bfloat16",
            tensor_parallel_size=self.tensor_parallel,
            gpu_memory_utilization=self.memory_share,
            max_model_len=self.context_tokens,
            enable_prefix_caching=False,
        )
        engine = AsyncLLM.from_engine_args(arguments)
        return VllmSession(self.kind, engine, read_shape(directory).vocab)


class VllmSession(StreamingSession):
    """A running vLLM engine."""

    def __init__(self, name: str, engine: Any, vocab_size: int) -> None:
        super().__init__(name, engine, vocab_size)
        self._numbers = count()

    async def stream(self, prompt: list[int], new_tokens: int) -> AsyncIterator[int]:
        """See the base class."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=new_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        tokens = 0
        request = {"prompt_token_ids": prompt}
        name = f"trt-kd-{next(self._numbers)}"
        async for output in self._engine.generate(request, sampling, request_id=name):
            tokens += len(output.outputs[0].token_ids)
            yield tokens
