"""One model in a process of its own: what is measured there is only that model's.

The process is a fresh interpreter, not a fork, and does not import the caller's main module: it
loads no more than its backend needs, so its peak memory is the backend's. It ends with its
parent: its end of the pipe closes. Messages are JSON.
"""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

from trt_kd.backends import BACKENDS
from trt_kd.backends.base import Backend, Session
from trt_kd.config import build_plugin
from trt_kd.errors import ModelError, TrtKdError
from trt_kd.measuring.clock import measure_call, measure_steps
from trt_kd.measuring.gpu import GpuWatch, gpu_use
from trt_kd.measuring.machine import peak_memory_bytes, with_steady_heap
from trt_kd.registry import Registry

_PATIENCE_S = 10
_OUT_OF_MEMORY = re.compile(r"out of memory|allocate memory|bad.?alloc", re.IGNORECASE)
_CODE = "import sys; from trt_kd.backends.worker import serve; serve(int(sys.argv[1]))"


@dataclass(frozen=True)
class Run:
    """One measured workload."""

    step_s: list[float]
    """Seconds of every step; the first includes prefill."""
    peak_memory_bytes: int
    """Largest resident memory of the process so far, loading included."""
    gpu: dict[str, Any] | None = None
    """See ``trt_kd.measuring.gpu.gpu_use``; None where no GPU was watched."""


class OutOfMemoryError(TrtKdError):
    """A workload needs more memory than there is; smaller ones may still run."""


class Worker:
    """A loaded model in a child process. A context manager: leaving it ends the process."""

    def __init__(
        self, name: str, backend: Backend, directory: Path, watch: GpuWatch | None = None
    ) -> None:
        """Start a process that loads ``directory``; ``name`` stands in every error.

        ``watch`` looks at the GPUs if the backend runs on one.

        Raises:
            TrtKdError: if the model cannot be loaded.
        """
        self.name = name
        self._watch = watch if backend.on_gpu() else None
        self._pipe, theirs = Pipe()
        paths = [str(Path(entry or ".").resolve()) for entry in sys.path]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE, str(theirs.fileno())],
            env=with_steady_heap(os.environ | {"PYTHONPATH": os.pathsep.join(paths)}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        try:
            request = {"backend": backend.model_dump(mode="json"), "directory": str(directory)}
            told = self._ask(request)
            self.load_s = float(told["load_s"])
            """Seconds to load the runtime's libraries and the model."""
            self.compiles = bool(told["compiles"])
            """Whether workloads are compiled for."""
        except BaseException:
            self.close()
            raise

    def run(self, prompts: list[list[int]], new_tokens: int) -> Run:
        """Decode ``prompts`` and return the times of the steps.

        Raises:
            OutOfMemoryError: if the process could not get the memory; it goes on serving.
            TrtKdError: if it failed otherwise or died.
        """
        request = {"prompts": prompts, "new_tokens": new_tokens}
        if self._watch is None:
            return Run(**self._ask(request))
        start_s = self._watch.clock()
        told = self._ask(request)
        end_s = self._watch.clock()
        used = gpu_use(self._watch.between(start_s, end_s), start_s, end_s)
        return Run(**told, gpu=used)

    def compile(self, prompts: list[list[int]], new_tokens: int) -> float:
        """Compile for a workload of this shape; return the seconds that it took.

        Raises:
            OutOfMemoryError: if the process could not get the memory; it goes on serving.
            TrtKdError: if it failed otherwise or died.
        """
        request = {"prompts": prompts, "new_tokens": new_tokens, "compile": True}
        return float(self._ask(request)["compile_s"])

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        try:
            self._process.wait(timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        """Return the worker itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the process, at once if something went wrong."""
        if error is not None:
            self._process.kill()
        self.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            self._pipe.send_bytes(json.dumps(request).encode())
            answer: dict[str, Any] = json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError) as error:
            raise ModelError(
                f"variant {self.name}: its process {self._ending()}",
                hint="signal 9 is mostly the system short of memory: try smaller batch sizes; "
                "anything else is told above",
            ) from error
        if "error" in answer:
            kind = OutOfMemoryError if answer["out_of_memory"] else ModelError
            raise kind(f"variant {self.name}: {answer['error']}", hint=answer["hint"])
        return answer

    def _ending(self) -> str:
        try:
            code = self._process.wait(timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        return f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"


def serve(descriptor: int) -> None:
    """Child's side: load what the first message says, then measure until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to end
    session: Session | None = None
    with Connection(descriptor) as pipe:
        while True:
            try:
                request = json.loads(pipe.recv_bytes())
            except EOFError:
                return
            try:
                if session is None:
                    session, answer = _load(request)
                else:
                    answer = _measure(session, request)
            except (TrtKdError, MemoryError, OSError, RuntimeError, ValueError) as error:
                answer = _failure(error)
            try:
                pipe.send_bytes(json.dumps(answer).encode())
            except BrokenPipeError:
                return


def _load(request: dict[str, Any]) -> tuple[Session, dict[str, Any]]:
    registry: Registry[Any] = BACKENDS
    backend: Any = build_plugin(registry, request["backend"])
    loaded: list[Session] = []
    seconds = measure_call(lambda: loaded.append(backend.load(Path(request["directory"]))))
    return loaded[0], {"load_s": seconds, "compiles": loaded[0].compiles}


def _measure(session: Session, request: dict[str, Any]) -> dict[str, Any]:
    prompts, new_tokens = request["prompts"], request["new_tokens"]
    if request.get("compile"):
        return {"compile_s": measure_call(lambda: session.compile(prompts, new_tokens))}
    step_s = measure_steps(session, prompts, new_tokens)
    return {"step_s": step_s, "peak_memory_bytes": peak_memory_bytes()}


def _failure(error: BaseException) -> dict[str, Any]:
    """Describe ``error`` in one line, and whether a smaller workload may still run."""
    fixable = isinstance(error, TrtKdError)
    text = error.args[0] if fixable else f"{type(error).__name__}: {error}"
    return {
        "error": " ".join(str(text).split()),
        "hint": error.hint if isinstance(error, TrtKdError) else None,
        "out_of_memory": isinstance(error, MemoryError) or out_of_memory(str(text)),
    }


def out_of_memory(text: str) -> bool:
    """Whether a runtime's message says that memory was short."""
    return bool(_OUT_OF_MEMORY.search(text))
