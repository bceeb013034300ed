"""Several processes of one training run, as torchrun starts them: who writes, who waits, how long.

Process 0 writes; what it finds or decides the others are told through the launcher's store. A
process that fails says so there, and a store that is gone is a failure too, so that nobody waits
for a process that has gone.
"""

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from trt_kd.artifacts import Artifact, Draft, writing
from trt_kd.config import StageConfig
from trt_kd.errors import ConfigError, TrtKdError

STEP_LIMIT = timedelta(minutes=30)
"""Longest wait for the other processes inside a training step."""
WORK_LIMIT = timedelta(days=2)
"""Longest wait for what process 0 does alone, such as writing a cache of logits."""
FAREWELL_S = 5.0
"""How long process 0 stays for the others to hear that it failed."""
POLL_S = 0.05
"""Between two looks whether a message is there."""

_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FAILED = "failed"


@dataclass(frozen=True)
class Processes:
    """This process among those of its run."""

    rank: int = 0
    """Number of this process, from 0."""
    count: int = 1
    """Processes of the run."""
    store: Any = field(default=None, repr=False)
    """torch's key-value store that all of them reach; None for a single process."""
    _numbers: Iterator[int] = field(default_factory=itertools.count, repr=False, compare=False)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, make: Callable[[], Any]) -> Any:
        """The result of ``make``, a JSON value, which process 0 alone calls.

        Raises:
            TrtKdError: if another process failed or is gone.
        """
        if self.store is None:
            return make()
        key = f"message/{next(self._numbers)}"
        if self.main:
            value = make()
            self.store.set(key, json.dumps(value))
            return value
        self._await(lambda: bool(self.store.check([key])))
        return json.loads(self.store.get(key))

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on process 0, then on the others.

        Raises:
            TrtKdError: if another process failed or is gone.
        """
        if not self.main:
            self.share(lambda: None)
        yield
        if self.main:
            self.share(lambda: None)

    def wait(self) -> None:
        """Wait until every process has come here.

        Raises:
            TrtKdError: if another process failed or is gone.
        """
        if self.store is not None:
            key = f"wait/{next(self._numbers)}"
            self.store.add(key, 1)
            self._await(lambda: int(self.store.add(key, 0)) == self.count)

    def _await(self, ready: Callable[[], bool]) -> None:
        end = time.monotonic() + WORK_LIMIT.total_seconds()
        try:
            while not ready():
                if self.store.check([_FAILED]):
                    raise TrtKdError(self.store.get(_FAILED).decode(), hint="see its own message")
                if time.monotonic() > end:
                    raise TrtKdError(
                        f"process {self.rank} waited for {WORK_LIMIT}",
                        hint="look at what process 0 does, then run again to resume",
                    )
                time.sleep(POLL_S)
        except RuntimeError as error:  # what torch's store raises when process 0 is gone
            reason = str(error).strip().partition("\n")[0]
            raise TrtKdError(
                f"process {self.rank} lost process 0: {reason}", hint="run again to resume"
            ) from error

    def _fail(self, error: BaseException) -> None:
        """Tell the others, unless one has told them already or there is nobody left to tell.

        Process 0, which may host the store, stays a moment so that they can hear it.
        """
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        with suppress(RuntimeError):
            self.store.compare_set(_FAILED, "", f"process {self.rank} stopped: {reason}")
            self.store.add("left", 1)
            end = time.monotonic() + FAREWELL_S
            while self.main and int(self.store.add("left", 0)) < self.count:
                if time.monotonic() > end:
                    return
                time.sleep(POLL_S)

    def _leave(self) -> None:
        """Let process 0, which may host the store, go last."""
        left = int(self.store.add("left", 1))
        if self.main and left < self.count:
            self._await(lambda: int(self.store.add("left", 0)) == self.count)


@contextmanager
def writing_once(
    processes: Processes, out: Path, config: StageConfig, inputs: Mapping[str, Artifact]
) -> Iterator[Draft | None]:
    """Yield the draft of checkpoint ``out`` on process 0, None on the others.

    They go on once it was begun and leave once it is finished.

    Raises:
        ArtifactError: see ``writing``.
        TrtKdError: if process 0 failed.
    """
    with ExitStack() as stack:
        with processes.main_first():
            draft = (
                stack.enter_context(writing(out, kind="checkpoint", config=config, inputs=inputs))
                if processes.main
                else None
            )
        yield draft
        with processes.main_first():
            stack.close()


def launched() -> tuple[int, int]:
    """Rank and count of processes as the launcher's environment tells; 0 and 1 without one.

    Raises:
        ConfigError: if only a part of that environment is set.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if count == "1":
        return 0, 1
    missing = [name for name in _NAMES if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {count} and {', '.join(missing)} not set",
            hint="start with torchrun or accelerate launch, or unset WORLD_SIZE",
        )
    return int(os.environ["RANK"]), int(count)


def require_one_process(what: str) -> None:
    """Refuse several processes where one does the work.

    Raises:
        ConfigError: if a launcher started more than one.
    """
    _, count = launched()
    if count > 1:
        raise ConfigError(
            f"{what} works in one process, {count} were started",
            hint="start it without a launcher; trt-kd distill is what takes several",
        )


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes of this run for the time of the block.

    Gloo carries messages and tensors on the CPU, NCCL those on GPUs, one GPU for a process.

    Raises:
        ConfigError: if only a part of the launcher's environment is set.
    """
    rank, count = launched()
    if count == 1:
        yield Processes()
        return
    import torch
    from torch import distributed

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    prefix: Any = distributed.distributed_c10d.PrefixStore
    store = prefix(f"trt_kd/{next(_MEETINGS)}", _store())
    distributed.init_process_group(
        backend, store=store, rank=rank, world_size=count, timeout=STEP_LIMIT
    )
    processes = Processes(rank, count, prefix("messages", store))
    try:
        yield processes
        processes._leave()
    except BaseException as error:
        processes._fail(error)
        raise
    finally:
        distributed.destroy_process_group()


_MEETINGS = itertools.count()
"""A name for every meeting: addresses of an earlier one stay in the launcher's store."""


@cache
def _store() -> Any:
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://"))
    return store
