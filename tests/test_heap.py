"""Pages of freed memory stay while they are wanted, and go afterwards."""

import ctypes
import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"),
    reason="glibc is not here",
)

SCRIPT = """
import json, os, resource
from trt_kd.heap import kept_pages

BYTES = 64 << 20

def made():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytes(bytearray(1) * BYTES)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

found = {"pages": BYTES // resource.getpagesize(), "start": resident(), "before": made()}
with kept_pages():
    for _ in range(3):  # until the heap is large enough
        made()
    found["inside"], found["held"] = made(), resident()
found["end"], found["after"] = resident(), made()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    """Pages made and held, in a process whose heap nobody else has touched."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_block_freed_is_taken_again_with_its_pages(found):
    assert found["before"] >= found["pages"]
    assert found["inside"] < 0.01 * found["pages"]
    assert found["after"] >= found["pages"]


def test_memory_is_returned_in_the_end(found):
    assert found["held"] > found["start"] + 0.9 * found["pages"]
    assert found["end"] < found["start"] + 0.1 * found["pages"]
