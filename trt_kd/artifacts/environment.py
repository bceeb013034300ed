"""What the machine is: recorded with every artifact, so that numbers can be judged later."""

import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from trt_kd import __version__

PACKAGES = (
    "torch",
    "transformers",
    "nvidia-modelopt",
    "accelerate",
    "onnxruntime",
    "onnxruntime-genai",
    "lm-eval",
    "tensorrt-llm",
    "tensorrt-rtx",
)


@cache
def environment() -> dict[str, str | int | None]:
    """Hardware and versions: processor, cores, memory, GPU driver, packages; no names of hosts."""
    facts: dict[str, str | int | None] = {
        "trt-kd": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_bytes": memory_bytes(),
        "gpu": _gpu(),
    }
    return facts | {name: installed(name) for name in PACKAGES if installed(name)}


def installed(package: str) -> str | None:
    """Version of an installed distribution, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def memory_bytes() -> int | None:
    """Physical memory of this machine, or None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu() -> str | None:
    """Name of the first GPU as the driver tells it, without loading a framework."""
    names = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    for path in names:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("Model:"):
                return f"{len(names)} x {line.partition(':')[2].strip()}"
    return None
