"""The header of a GGUF file: metadata and tensor names, without the tensors.

Layout: github.com/ggml-org/ggml, docs/gguf.md (versions 2 and 3). Every length is checked against
the size of the file before anything is read, so a hostile header costs no memory.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from trt_kd.architectures.shape import ModelShape
from trt_kd.errors import ModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufHeader:
    """Metadata by name (arrays left out) and the dimensions of every tensor, fastest first."""

    metadata: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]

    def shape(self) -> ModelShape | None:
        """Sizes of a model of the llama family; None for another family."""
        hidden, heads = self._count("embedding_length"), self._count("attention.head_count")
        if not hidden or not heads or "token_embd.weight" not in self.tensors:
            return None
        return ModelShape(
            model_type="llama",
            layers=self._count("block_count"),
            hidden=hidden,
            ffn=self._count("feed_forward_length"),
            heads=heads,
            kv_heads=self._count("attention.head_count_kv") or heads,
            head_dim=self._count("attention.key_length") or hidden // heads,
            vocab=self.tensors["token_embd.weight"][1],
            tied="output.weight" not in self.tensors,
        )

    def _count(self, name: str) -> int:
        return int(self.metadata.get(f"llama.{name}", 0))


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of the GGUF file at ``path``.

    Raises:
        ModelError: if it is not GGUF, is truncated or is of a version not known.
    """
    try:
        with path.open("rb") as file:
            return _Reader(file, path.stat().st_size).header()
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise ModelError(
            f"{path} is not a readable GGUF file: {error}", hint="download the file again"
        ) from error


class _Reader:
    """Reads one value after the other, never past the end of the file."""

    def __init__(self, file: BinaryIO, size_bytes: int) -> None:
        self._file = file
        self._size_bytes = size_bytes

    def header(self) -> GgufHeader:
        magic, version, tensors, fields = self._unpack("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it begins with {magic!r}, version {version}")
        metadata = {}
        for _ in range(self._bounded(fields, 13)):
            name = self._string()
            value = self._value(self._unpack("<I")[0])
            if value is not None:
                metadata[name] = value
        dimensions = {}
        for _ in range(self._bounded(tensors, 24)):
            name = self._string()
            count = self._bounded(self._unpack("<I")[0], 8)
            dimensions[name] = self._unpack(f"<{count}Q")
            self._unpack("<IQ")
        return GgufHeader(metadata, dimensions)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise ValueError(f"a value has the unknown type {kind}")
            return self._unpack(f"<{_SCALARS[kind]}")[0]
        kind, count = self._unpack("<IQ")
        if kind in _SCALARS:
            self._skip(count * struct.calcsize(f"<{_SCALARS[kind]}"))
            return None
        for _ in range(self._bounded(count, 8)):
            if kind == _STRING:
                self._skip(self._unpack("<Q")[0])
            else:
                self._value(kind)
        return None

    def _string(self) -> str:
        length = self._bounded(self._unpack("<Q")[0], 1)
        return self._file.read(length).decode("utf-8")

    def _unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self._file.read(struct.calcsize(form)))

    def _skip(self, count: int) -> None:
        self._file.seek(self._bounded(count, 1), 1)

    def _bounded(self, count: int, bytes_each: int) -> int:
        """``count``, if that many things of a size fit into what is left of the file."""
        left = self._size_bytes - self._file.tell()
        if count * bytes_each > left:
            raise ValueError(f"it promises {count:,} entries where {left:,} bytes are left")
        return count
