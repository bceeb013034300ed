"""The state of the machine while something is measured."""

import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
STEADY_HEAP = (
    "glibc.malloc.hugetlb=1",
    "glibc.malloc.mmap_max=0",
    f"glibc.malloc.trim_threshold={1 << 62}",
)
"""Huge pages where the kernel gives them, and pages that stay when their memory is freed."""


def with_steady_heap(variables: Mapping[str, str]) -> dict[str, str]:
    """Environment for a process whose heap consists of huge pages and keeps them.

    Which small pages a process happens to get decides its decoding speed by several percent and for
    as long as it lives; making and returning the pages of a prompt's logits decides a long prefill
    by a fifth; see docs/benchmarking.md. glibc 2.35 and newer know all of the tunables, others
    ignore the first or all; what ``variables`` say of them comes later and wins.
    """
    name = "GLIBC_TUNABLES"
    tunables = [*STEADY_HEAP, *filter(None, [variables.get(name)])]
    return {**variables, name: ":".join(tunables)}


def huge_pages() -> str | None:
    """When the kernel gives huge pages: ``always``, ``madvise`` (on request) or ``never``."""
    if not _HUGE_PAGES.is_file():
        return None
    text = _HUGE_PAGES.read_text(encoding="utf-8")
    return text.partition("[")[2].partition("]")[0] or None


def available_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def affinity() -> list[int] | None:
    """Numbers of the cores this process may use; None where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def conditions() -> dict[str, Any]:
    """What of the machine bears on every time measured: cores and pages."""
    return {"affinity": affinity(), "huge_pages": huge_pages()}


def load_average() -> float | None:
    """Runnable processes averaged over the last minute; None where the system does not tell."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None


def peak_memory_bytes() -> int:
    """Largest resident memory of this process since it started.

    Linux hands the largest size known to ``getrusage`` down through fork and exec, so a child
    would report its parent's; the high-water mark of the address space is its own.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
