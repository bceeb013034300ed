"""What a stage frees stays with the process while the stage runs, on a CPU.

glibc returns every large block to the kernel as soon as it is freed, and the next one arrives as
pages that the kernel has yet to make. A training step on a CPU frees and takes gigabytes, and
making their pages costs it a tenth of its time. GPUs have an allocator of their own for this.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # malloc.h
_NEVER, _NONE = -1, 0
_TRIM_DEFAULT_BYTES, _MMAP_DEFAULT_BLOCKS = 128 << 10, 65536  # mallopt(3)


@contextmanager
def kept_pages() -> Iterator[None]:
    """Keep freed memory until the end, then return it; under glibc, where torch sees no GPU.

    The peak is what it was but for gaps between blocks. Settings are those of the process: one of
    these at a time.
    """
    libc = ctypes.CDLL(None)
    torch = sys.modules.get("torch")
    if not hasattr(libc, "gnu_get_libc_version") or (torch and torch.cuda.is_available()):
        yield
        return
    libc.mallopt(_MMAP_MAX, _NONE)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_MAX, _MMAP_DEFAULT_BLOCKS)
        libc.mallopt(_TRIM_THRESHOLD, _TRIM_DEFAULT_BYTES)
        libc.malloc_trim(0)
