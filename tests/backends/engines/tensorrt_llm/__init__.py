"""Stands in for TensorRT-LLM's LLM API: the documented names that our backend uses."""

import asyncio
from dataclasses import dataclass
from types import SimpleNamespace


@dataclass
class SamplingParams:
    max_tokens: int = 32
    top_k: int | None = None
    ignore_eos: bool = False
    detokenize: bool = True


class LLM:
    def __init__(
        self, model, *, dtype="auto", tensor_parallel_size=1, kv_cache_config=None, max_seq_len=None
    ):
        self.args = SimpleNamespace(
            model=model,
            dtype=dtype,
            tensor_parallel_size=tensor_parallel_size,
            kv_cache_config=kv_cache_config,
            max_seq_len=max_seq_len,
        )
        self.requests = []
        self.in_flight = self.most_in_flight = 0
        self.down = False

    def generate_async(self, inputs, sampling_params=None, streaming=False):
        asyncio.get_running_loop()  # the real one needs it to stream into
        self.requests.append((len(self.requests), inputs, sampling_params))
        return self._answer(inputs, sampling_params, streaming)

    async def _answer(self, ids, sampling, streaming):
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        wanted = sampling.max_tokens if sampling.ignore_eos else 3
        wanted = min(wanted, (self.args.max_seq_len or 10_000) - len(ids))
        for count in range(1, wanted + 1):
            for _ in range(ids[0] % 5):
                await asyncio.sleep(0)
            if streaming or count == wanted:
                yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7] * count)])
        self.in_flight -= 1

    def shutdown(self):
        self.down = True
