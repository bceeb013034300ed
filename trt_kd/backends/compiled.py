"""Decoding steps of a transformers model compiled by ``torch.compile`` over a static cache.

Prefill stays eager, as in transformers' own ``generate`` with a static cache. One workload is
compiled for at a time: its batch size and length are constants of the program, and a step that
would need another program is an error rather than a pause in the middle of a measurement.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from itertools import islice
from shutil import which
from typing import TYPE_CHECKING, Any

from trt_kd.backends.base import rectangle
from trt_kd.backends.transformers import TransformersSession
from trt_kd.errors import MissingDependencyError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_RUNS_UNTIL_STEADY = 4
"""Prefill, then steps that compile, record a CUDA graph and replay it."""


def require_compiler() -> None:
    """Check that the C++ compiler is there that ``torch.compile`` writes programs for.

    Raises:
        MissingDependencyError: if it is not.
    """
    name = os.environ.get("CXX", "g++")
    if which(name) is None:
        raise MissingDependencyError(
            f"torch.compile needs a C++ compiler and there is no {name}",
            hint="install g++ or name another one in CXX, or set compile=false",
        )


class CompiledSession(TransformersSession):
    """A transformers model whose decoding steps are compiled, workload by workload."""

    compiles = True

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__(model)
        self._made_for: tuple[int, int] | None = None
        self._cache: Any = None
        self._step: Callable[..., Tensor] | None = None

    def compile(self, prompts: list[list[int]], new_tokens: int) -> None:
        """See the base class."""
        import torch
        from transformers import StaticCache

        batch, length = rectangle(prompts).shape
        if self._made_for == (batch, length + new_tokens):
            return
        self._made_for = None
        torch.compiler.reset()
        model = self._opened()
        self._cache = StaticCache(config=model.config, max_cache_len=length + new_tokens)
        mode = "reduce-overhead" if model.device.type == "cuda" else None
        self._step = torch.compile(_step_of(model), fullgraph=True, dynamic=False, mode=mode)
        for _ in islice(self._decode(prompts, new_tokens), _RUNS_UNTIL_STEADY):
            pass
        self._made_for = (batch, length + new_tokens)

    def greedy(self, prompts: list[list[int]], new_tokens: int) -> "Iterator[Tensor]":
        """See the base class; compiles first where that was not done."""
        import torch

        self.compile(prompts, new_tokens)
        decoding = self._decode(prompts, new_tokens)
        while True:
            with torch.compiler.set_stance("fail_on_recompile"):
                ids_B1 = next(decoding, None)
            if ids_B1 is None:
                return
            yield ids_B1

    def close(self) -> None:
        """See the base class."""
        self._made_for = self._cache = self._step = None
        super().close()

    def _decode(self, prompts: list[list[int]], new_tokens: int) -> "Iterator[Tensor]":
        import torch

        model, step = self._opened(), self._step
        ids_BL = torch.as_tensor(rectangle(prompts), device=model.device)
        length = ids_BL.shape[1]
        with torch.inference_mode():
            self._cache.reset()
        positions = torch.arange(length + new_tokens, device=model.device)
        for count in range(new_tokens):
            with torch.inference_mode():
                if count == 0:
                    ids_BL = _step_of(model)(ids_BL, positions[:length], self._cache)
                elif step is not None:
                    place = positions[length + count - 1 : length + count].clone()
                    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
                    ids_BL = step(ids_BL, place, self._cache).clone()
                if ids_BL.is_cuda:
                    torch.cuda.synchronize(ids_BL.device)
            yield ids_BL


def _step_of(model: Any) -> "Callable[..., Tensor]":
    """One step of greedy decoding: ids ``[B, L]`` at positions ``[L]`` to the next ``[B, 1]``."""
    says_place = "cache_position" in inspect.signature(model.forward).parameters

    def step(ids_BL: "Tensor", positions_L: "Tensor", cache: Any) -> "Tensor":
        place = {"cache_position": positions_L} if says_place else {}
        output = model(
            ids_BL,
            position_ids=positions_L.unsqueeze(0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **place,
        )
        ids_B1: Tensor = output.logits[:, -1].argmax(-1, keepdim=True)
        return ids_B1

    return step
