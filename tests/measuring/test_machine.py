import ctypes
import os
import subprocess
import sys

import pytest

from trt_kd.measuring.machine import STEADY_HEAP, huge_pages, with_steady_heap


def test_a_heap_asks_for_steady_pages_and_what_the_user_set_comes_last():
    assert with_steady_heap({"A": "b"}) == {"A": "b", "GLIBC_TUNABLES": ":".join(STEADY_HEAP)}
    theirs = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    assert with_steady_heap(theirs)["GLIBC_TUNABLES"].endswith(":glibc.malloc.hugetlb=0")
    assert theirs == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}


@pytest.mark.skipif(huge_pages() not in ("always", "madvise"), reason="no huge pages here")
def test_the_kernel_then_gives_them():
    code = (
        "kept = b'x' * 2**26;"
        "print(next(l for l in open('/proc/self/smaps_rollup') if l.startswith('AnonHuge')))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=with_steady_heap(os.environ),
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(ran.stdout.split()[1]) >= 2**15


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc is not here"
)
def test_freed_pages_are_taken_again():
    code = (
        "import resource as r\n"
        "def made():\n"
        "    before = r.getrusage(r.RUSAGE_SELF).ru_minflt\n"
        "    bytes(bytearray(1) * 2**26)\n"
        "    return r.getrusage(r.RUSAGE_SELF).ru_minflt - before\n"
        "made(), made(), made(), print(made())"
    )
    command = [sys.executable, "-c", code]
    no_huge_pages = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    faults = [
        int(subprocess.run(command, env=env, capture_output=True, check=True).stdout)
        for env in (no_huge_pages, with_steady_heap(no_huge_pages))
    ]
    assert faults[0] >= 2**26 // os.sysconf("SC_PAGE_SIZE")
    assert faults[1] < 0.01 * faults[0]
