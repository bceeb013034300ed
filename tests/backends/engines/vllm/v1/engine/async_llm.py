"""An engine that answers one token at a time; end-of-text comes third unless it is ignored."""

import asyncio
from types import SimpleNamespace

from vllm.sampling_params import RequestOutputKind


class AsyncLLM:
    @classmethod
    def from_engine_args(cls, engine_args):
        made = cls()
        made.args = engine_args
        made.requests = []
        made.in_flight = made.most_in_flight = 0
        made.cap = engine_args.max_model_len or 10_000
        made.down = False
        made.handler = None
        return made

    async def generate(self, prompt, sampling_params, request_id):
        if self.handler is None:  # as the real one, made in the loop of the first request
            self.handler = asyncio.ensure_future(asyncio.sleep(3600))
        ids = prompt["prompt_token_ids"]
        self.requests.append((request_id, ids, sampling_params))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        wanted = sampling_params.max_tokens if sampling_params.ignore_eos else 3
        wanted = min(wanted, self.cap - len(ids))
        for _ in range(wanted):
            for _ in range(ids[0] % 5):  # requests do not advance in step
                await asyncio.sleep(0)
            delta = sampling_params.output_kind is RequestOutputKind.DELTA
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7] if delta else None)])
        self.in_flight -= 1

    def shutdown(self):
        self.down = True
