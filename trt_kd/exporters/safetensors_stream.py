"""Write a safetensors file one tensor at a time, in any order, without holding it in memory.

Source of the format: the README of huggingface/safetensors. Tensors lie by falling item size, so
that each is aligned; the header is padded to a multiple of eight bytes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from typing_extensions import Self

TYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
}


class StreamedFile:
    """A safetensors file whose tensors are known by type and shape before they are made.

    A context manager: leaving it without an error checks that nothing was left out.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]):
        """Write the header and reserve room for every tensor of ``tensors``."""
        self._expected = dict(tensors)
        self._offsets: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in sorted(
            tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])
        ):
            size = dtype.itemsize * torch.Size(shape).numel()
            header[name] = {
                "dtype": TYPES[dtype],
                "shape": list(shape),
                "data_offsets": [end, end + size],
            }
            self._offsets[name] = end
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._start + end)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write tensor ``name``.

        Raises:
            ValueError: if it was not announced, is written twice or of another type or shape.
        """
        if name not in self._expected:
            raise ValueError(f"{name} was not announced or is written twice")
        found = (tensor.dtype, tuple(tensor.shape))
        if found != self._expected[name]:
            raise ValueError(f"{name} is {found}, announced as {self._expected[name]}")
        del self._expected[name]
        self._file.seek(self._start + self._offsets[name])
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._file.write(data.data)

    def __enter__(self) -> Self:
        """Return the file itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file.

        Raises:
            ValueError: if an announced tensor was not written.
        """
        self._file.close()
        if kind is None and self._expected:
            raise ValueError(
                f"{len(self._expected)} tensors were not written: {min(self._expected)}"
            )
