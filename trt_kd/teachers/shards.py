"""One file of a cache: samples in safetensors, whole or not there at all.

A shard says in its header whose it is, so that a killed run's shards can be taken up without an
index. Samples are found by id, the sha256 of their token ids: batch size and order are free.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from trt_kd.config import StrictModel
from trt_kd.errors import ArtifactError
from trt_kd.teachers.identity import Identity

ID_BYTES = 16
SCHEMA_VERSION: Literal[1] = 1
_HEADER = "trt_kd"


class Contents(StrictModel):
    """What all shards of a cache have in common."""

    schema_version: Literal[1] = SCHEMA_VERSION
    """Version of this layout."""
    k: int
    """Tokens kept per position, draws included."""
    draws: int = 0
    """Those of them that are drawn from what is not among the likeliest."""
    identity: Identity
    """Whose log-probabilities these are."""

    @property
    def likeliest(self) -> int:
        """Tokens kept per position for their probability."""
        return self.k - self.draws


def sample_ids(blocks: NDArray[np.int64]) -> list[bytes]:
    """Id of every block ``[count, L]``: the first 128 bits of the sha256 of its token ids."""
    rows = np.ascontiguousarray(blocks, dtype="<i8")
    return [hashlib.sha256(row.tobytes()).digest()[:ID_BYTES] for row in rows]


@dataclass(frozen=True)
class Shard:
    """A complete shard; it is mapped into memory, and payloads are read as they are asked for."""

    path: Path

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size

    def check_size(self, expected: int) -> None:
        """Check that the file is there and as long as it was.

        Raises:
            ArtifactError: if it is not.
        """
        if not self.path.is_file():
            raise ArtifactError(
                f"{self.path} is missing", hint="run again: the samples in it are written anew"
            )
        if self.size_bytes != expected:
            raise damaged(self.path, f"it has {self.size_bytes:,} bytes of {expected:,}")

    @cached_property
    def contents(self) -> Contents:
        """What it holds.

        Raises:
            ArtifactError: if the file is damaged.
        """
        try:
            return Contents.model_validate_json((self._file.metadata() or {})[_HEADER])
        except (KeyError, ValidationError) as error:
            raise damaged(self.path, "its header is not that of a shard") from error

    @cached_property
    def samples(self) -> list[bytes]:
        """Ids of its samples in the order of their payloads."""
        packed = self._file.get_tensor("ids").tobytes()
        return [packed[start : start + ID_BYTES] for start in range(0, len(packed), ID_BYTES)]

    def payload(self, index: int) -> bytes:
        """Encoded rows of the sample at ``index``."""
        start, end = self._offsets[index : index + 2]
        payload: NDArray[np.uint8] = self._payload[int(start) : int(end)]
        return payload.tobytes()

    @cached_property
    def dropped(self) -> NDArray[np.float32]:
        """Mean probability per row, of every sample, of tokens left out of the vocabulary."""
        if "dropped" not in self._file.keys():  # noqa: SIM118 - no mapping
            return np.zeros(len(self.samples), dtype=np.float32)
        return self._file.get_tensor("dropped")  # type: ignore[no-any-return]

    @cached_property
    def _file(self) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise damaged(self.path, str(error)) from error

    @cached_property
    def _offsets(self) -> NDArray[np.int64]:
        return self._file.get_tensor("offsets")  # type: ignore[no-any-return]

    @cached_property
    def _payload(self) -> Any:
        return self._file.get_slice("payload")


@dataclass(frozen=True)
class Samples:
    """What goes into a shard, sample by sample."""

    ids: Sequence[bytes]
    """See ``sample_ids``."""
    payloads: Sequence[bytes]
    """Encoded rows."""
    dropped: Sequence[float]
    """Mean probability per row of tokens that are left out of the vocabulary."""


def write_shard(path: Path, contents: Contents, samples: Samples) -> Shard:
    """Write, sync and rename into place; equal samples give equal bytes.

    Raises:
        ArtifactError: if the disk is full or refuses.
    """
    from safetensors.numpy import save

    lengths = np.array([len(payload) for payload in samples.payloads], dtype=np.int64)
    tensors = {
        "ids": np.frombuffer(b"".join(samples.ids), dtype=np.uint8),
        "offsets": np.concatenate((np.zeros(1, dtype=np.int64), lengths.cumsum())),
        "payload": np.frombuffer(b"".join(samples.payloads), dtype=np.uint8),
    }
    if any(samples.dropped):
        tensors["dropped"] = np.array(samples.dropped, dtype=np.float32)
    header = json.dumps(contents.model_dump(mode="json"), sort_keys=True)
    put(path, save(tensors, {_HEADER: header}))
    return Shard(path)


def put(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all, synced to disk.

    Raises:
        ArtifactError: if the disk is full or refuses.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ArtifactError(
            f"{path} could not be written: {error.strerror}",
            hint="free disk space and run again: complete shards are kept",
        ) from error


def damaged(path: Path, what: str) -> ArtifactError:
    """The error for a shard that cannot be read."""
    reason = what.partition("\n")[0]
    return ArtifactError(
        f"{path} is damaged: {reason}", hint="remove this file and run again: it is written anew"
    )
