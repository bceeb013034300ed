"""Serving engines in this process: requests sent together, tokens counted as they stream out.

A batch is that many requests in flight. A step of the batch is finished when every request has its
next token, so a request that the engine's scheduler lets wait makes the step long, as it does for
its user. Tokens that reach one request together belong to steps that end together.
"""

import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterator, Collection, Iterator
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, PositiveInt, model_validator
from typing_extensions import Self

from trt_kd.backends.base import Backend, Session, rectangle
from trt_kd.errors import MissingDependencyError, ModelError


class Engine(Backend):
    """Settings that serving engines share."""

    reads: ClassVar[tuple[str, ...]] = ("checkpoint", "hf-unified")
    gives_logits: ClassVar[bool] = False
    package: ClassVar[str]
    """What has to be installed."""
    found_in: ClassVar[str]
    """Where it is, for the error of an environment that lacks it."""

    tensor_parallel: PositiveInt = 1
    """GPUs that share every layer."""
    memory_share: float = Field(default=0.4, gt=0, lt=1)
    """Share of the GPU's memory that the engine may take; variants of a benchmark are loaded
    together, so that the default leaves room for two."""
    context_tokens: PositiveInt | None = None
    """Longest prompt and answer together that the engine prepares for; None takes the model's."""

    @model_validator(mode="after")
    def _threads_have_no_effect(self) -> Self:
        if self.threads is not None:
            raise ValueError(f"threads: no effect in {self.kind}, which runs on a GPU")
        return self

    def check(self) -> None:
        """See the base class."""
        if find_spec(self.package) is None:
            raise MissingDependencyError(
                f"{self.package} is not installed", hint=f"run this trt-kd command {self.found_in}"
            )

    def on_gpu(self) -> bool:
        """See the base class."""
        return True


class StreamingSession(Session):
    """An engine that streams token ids, request by request."""

    def __init__(self, name: str, engine: Any, vocab_size: int) -> None:
        """Take over a running ``engine``, which has a method ``shutdown``."""
        self.vocab_size = vocab_size
        self._name = name
        self._engine = engine
        self._loop: asyncio.AbstractEventLoop | None = asyncio.new_event_loop()

    @abstractmethod
    def stream(self, prompt: list[int], new_tokens: int) -> AsyncIterator[int]:
        """Send a request that ignores end-of-text; yield how many tokens it has so far."""

    def logits(self, tokens_BL: np.ndarray) -> np.ndarray:
        """Refuse: engines stream tokens.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            f"{self._name} streams tokens and gives no logits",
            hint="evaluate the checkpoint, or the export by its own lane; time it here",
        )

    def steps(self, prompts: list[list[int]], new_tokens: int) -> Iterator[None]:
        """See the base class.

        Raises:
            ModelError: if a request ends with another number of tokens than asked.
        """
        rectangle(prompts)
        loop = self._opened()
        progress = _Progress(len(prompts))
        requests = [
            loop.create_task(self._follow(row, prompt, new_tokens, progress))
            for row, prompt in enumerate(prompts)
        ]
        try:
            for step in range(1, new_tokens + 1):
                loop.run_until_complete(progress.reached(step, requests))
                yield
            loop.run_until_complete(_all(requests))
        finally:
            _end(requests, loop)

    def close(self) -> None:
        """See the base class."""
        if self._loop is not None:
            self._engine.shutdown()
            self._engine = None
            _end(asyncio.all_tasks(self._loop), self._loop)  # the engine's own, which hand out
            self._loop.close()
            self._loop = None

    async def _follow(
        self, row: int, prompt: list[int], new_tokens: int, progress: "_Progress"
    ) -> None:
        count = 0
        async for count in self.stream(prompt, new_tokens):
            progress.tell(row, count)
        if count != new_tokens:
            raise ModelError(
                f"{self._name} answered with {count} tokens instead of {new_tokens}",
                hint="its context may be too short: raise context_tokens or ask for fewer tokens",
            )

    def _opened(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise ValueError("the session is closed")
        return self._loop


async def _all(tasks: "Collection[asyncio.Task[None]]") -> None:
    await asyncio.gather(*tasks)


def _end(tasks: "Collection[asyncio.Task[None]]", loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what of ``tasks`` still runs and wait until nothing does."""
    left = [task for task in tasks if not task.done() and task.cancel()]
    if left:
        loop.run_until_complete(asyncio.wait(left))
    for task in tasks:
        if task.done() and not task.cancelled():
            task.exception()  # one was raised already; the others would be logged as forgotten


class _Progress:
    """How many tokens every request has."""

    def __init__(self, requests: int) -> None:
        self._counts = [0] * requests
        self._changed = asyncio.Event()

    def tell(self, row: int, count: int) -> None:
        """Say that request ``row`` has ``count`` tokens."""
        self._counts[row] = count
        self._changed.set()

    async def reached(self, step: int, requests: "list[asyncio.Task[None]]") -> None:
        """Wait until every request has ``step`` tokens; a request that failed raises here."""
        while min(self._counts) < step:
            self._changed.clear()
            waiting = asyncio.ensure_future(self._changed.wait())
            pending = [request for request in requests if not request.done()]
            await asyncio.wait([waiting, *pending], return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            for request in requests:
                if request.done():
                    request.result()
