import os
import subprocess
import sys

import pytest

from trt_kd.measuring.machine import huge_pages, with_huge_pages


def test_a_heap_asks_for_huge_pages_and_what_the_user_set_comes_last():
    assert with_huge_pages({"A": "b"}) == {"A": "b", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    theirs = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    assert with_huge_pages(theirs)["GLIBC_TUNABLES"].endswith(":glibc.malloc.hugetlb=0")
    assert theirs == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}


@pytest.mark.skipif(huge_pages() not in ("always", "madvise"), reason="no huge pages here")
def test_the_kernel_then_gives_them():
    code = (
        "kept = b'x' * 2**26;"
        "print(next(l for l in open('/proc/self/smaps_rollup') if l.startswith('AnonHuge')))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=with_huge_pages(os.environ),
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(ran.stdout.split()[1]) >= 2**15
