"""Hugging Face transformers: the reference every other backend is compared with."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from trt_kd.architectures.shape import read_shape
from trt_kd.artifacts.environment import environment
from trt_kd.backends.base import Backend, Session, rectangle, work_of
from trt_kd.measuring.roofline import DecodeWork
from trt_kd.optional import require

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class TransformersBackend(Backend):
    """Stock transformers, eager or compiled: float32 on a CPU, bfloat16 on a GPU."""

    reads: ClassVar[tuple[str, ...]] = ("checkpoint",)

    kind: Literal["transformers"] = "transformers"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; ``auto`` takes the GPU if there is one."""
    compile: bool = False
    """Compile decoding steps (``torch.compile``) over a static cache, for one workload after the
    other; prefill stays eager. The time that takes is recorded by itself, as ``compile_s``."""

    def check(self) -> None:
        """See the base class."""
        require("torch", extra="compress")
        require("transformers", extra="compress")
        if self.compile:
            from trt_kd.backends.compiled import require_compiler

            require_compiler()

    def load(self, directory: Path) -> "TransformersSession":
        """See the base class."""
        self.check()
        import torch

        from trt_kd.checkpoints import load_model

        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        dtype = "bfloat16" if device == "cuda" else "float32"
        model: Any = load_model(directory, dtype=dtype)
        if self.compile:
            from trt_kd.backends.compiled import CompiledSession

            return CompiledSession(model.to(device))
        return TransformersSession(model.to(device))

    def on_gpu(self) -> bool:
        """See the base class."""
        return self.device == "cuda" or (self.device == "auto" and bool(environment()["gpu"]))

    def decode_work(self, directory: Path) -> DecodeWork | None:
        """See the base class; None on a GPU."""
        if self.on_gpu():
            return None
        return work_of(read_shape(directory), weight_bytes=4, kv_bytes=4)


class TransformersSession(Session):
    """A transformers model in memory, in evaluation mode, wherever it came from."""

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model: Any = model
        self.vocab_size = int(model.config.vocab_size)

    def logits(self, tokens_BL: np.ndarray) -> np.ndarray:
        """See the base class."""
        import torch

        model = self._opened()
        with torch.inference_mode():
            ids = torch.as_tensor(tokens_BL, dtype=torch.long, device=model.device)
            result: np.ndarray = model(ids, use_cache=False).logits.float().cpu().numpy()
        return result

    def steps(self, prompts: list[list[int]], new_tokens: int) -> Iterator[None]:
        """See the base class."""
        for _ in self.greedy(prompts, new_tokens):
            yield

    def greedy(self, prompts: list[list[int]], new_tokens: int) -> "Iterator[Tensor]":
        """Decode as ``steps`` does; yield the next token of every sequence, ``[B, 1]``."""
        import torch

        model = self._opened()
        ids_BL = torch.as_tensor(rectangle(prompts), device=model.device)
        cache = None
        for _ in range(new_tokens):
            with torch.inference_mode():
                output = model(ids_BL, past_key_values=cache, use_cache=True, logits_to_keep=1)
                ids_BL = output.logits[:, -1].argmax(-1, keepdim=True)
                cache = output.past_key_values
                if ids_BL.is_cuda:
                    torch.cuda.synchronize(ids_BL.device)
            yield ids_BL

    def close(self) -> None:
        """See the base class."""
        import gc

        import torch

        self.model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _opened(self) -> Any:
        if self.model is None:
            raise ValueError("the session is closed")
        return self.model
