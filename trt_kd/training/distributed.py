"""Several processes of one training run, as torchrun starts them: who writes, who waits, how long.

Process 0 writes; what it finds or decides the others are told. A failure of process 0 is told
too, and a lost connection is one, so that nobody waits for a process that has gone.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from trt_kd.errors import ConfigError, TrtKdError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

STEP_LIMIT = timedelta(minutes=30)
"""Longest wait for the other processes inside a training step."""
WORK_LIMIT = timedelta(days=2)
"""Longest wait for what process 0 does alone, such as writing a cache of logits."""

_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Processes:
    """This process among those of its run."""

    rank: int = 0
    """Number of this process, from 0."""
    count: int = 1
    """Processes of the run."""
    group: "ProcessGroup | None" = None
    """Group over gloo for messages between them; None for a single process."""

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, make: Callable[[], Any]) -> Any:
        """The result of ``make``, a JSON value, which process 0 alone calls.

        Raises:
            TrtKdError: on the other processes, if it failed or process 0 is gone.
        """
        if self.group is None:
            return make()
        if not self.main:
            message = self._heard()
            if "failed" in message:
                raise TrtKdError(
                    f"process 0 stopped: {message['failed']}", hint="see its own message"
                )
            return message["value"]
        try:
            value = make()
        except BaseException as error:
            self._say({"failed": f"{type(error).__name__}: {error}".splitlines()[0]})
            raise
        self._say({"value": value})
        return value

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on process 0, then on the others; if it fails there it fails everywhere.

        Raises:
            TrtKdError: see ``share``.
        """
        if not self.main:
            self.share(lambda: None)
            yield
            return
        try:
            yield
        except BaseException as error:
            if self.group is not None:
                self._say({"failed": f"{type(error).__name__}: {error}".splitlines()[0]})
            raise
        self.share(lambda: None)

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self.group is not None:
            from torch.distributed import barrier

            barrier(group=self.group)

    def _say(self, message: dict[str, Any]) -> None:
        import torch
        from torch.distributed import broadcast

        text = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        broadcast(torch.tensor([len(text)]), src=0, group=self.group)
        broadcast(text, src=0, group=self.group)

    def _heard(self) -> dict[str, Any]:
        import torch
        from torch.distributed import broadcast

        size = torch.zeros(1, dtype=torch.int64)
        try:
            broadcast(size, src=0, group=self.group)
            text = torch.empty(int(size), dtype=torch.uint8)
            broadcast(text, src=0, group=self.group)
        except RuntimeError as error:  # what gloo raises when the other side is gone
            reason = str(error).strip().splitlines()[0]
            raise TrtKdError(
                f"process {self.rank} lost process 0: {reason}", hint="run again to resume"
            ) from error
        message: dict[str, Any] = json.loads(bytes(text.tolist()))
        return message


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
    store = distributed.PrefixStore(f"trt_kd/{next(_MEETINGS)}", _store())
    distributed.init_process_group(
        backend, store=store, rank=rank, world_size=count, timeout=STEP_LIMIT
    )
    try:
        messages = distributed.new_group(backend="gloo", timeout=WORK_LIMIT)
        yield Processes(rank, count, messages)
    finally:
        distributed.destroy_process_group()


_MEETINGS = itertools.count()
"""A name for every meeting: addresses of an earlier one stay in the launcher's store."""


@cache
def _store() -> "Store":
    from torch.distributed import rendezvous

    store, _, _ = next(rendezvous("env://"))
    return store
