"""Pages of freed memory stay while they are wanted, and go afterwards."""

import ctypes
import resource
import sys

import pytest

from trt_kd.heap import kept_pages

BYTES = 64 << 20
PAGES = BYTES // resource.getpagesize()

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"),
    reason="glibc is not here",
)


def pages_made():
    """Pages that the kernel makes for a block that is written and freed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytes(bytearray(b"\1") * BYTES)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_block_freed_is_taken_again_with_its_pages():
    assert pages_made() >= PAGES
    with kept_pages():
        for _ in range(3):  # until the heap is large enough
            pages_made()
        assert pages_made() < 0.01 * PAGES
    assert pages_made() >= PAGES


def test_memory_is_returned_in_the_end():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1])

    before = resident()
    with kept_pages():
        pages_made()
        assert resident() > before + 0.9 * PAGES
    assert resident() < before + 0.1 * PAGES
