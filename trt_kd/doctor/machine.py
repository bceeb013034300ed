"""What the machine is: processor, memory, disk, GPU, commands. No framework is loaded."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trt_kd.artifacts.environment import memory_bytes
from trt_kd.doctor.check import Check

GIB = 1 << 30
PYTHON_RANGE = ((3, 10), (3, 13))
MIN_MEMORY_GIB = 8
MIN_DISK_GIB = 10
MIN_OPEN_FILES = 1024
LAUNCHER_VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS")

COMMANDS = {
    "trtllm-build": "run in the TensorRT-LLM 1.2.1 container, see containers/README.md",
    "trtllm-bench": "run in a TensorRT-LLM container, see containers/README.md",
    "trtllm-serve": "run in a TensorRT-LLM container, see containers/README.md",
    "aiperf": "pip install 'trt-kd[bench]', or AIPerf alone in an environment of its own",
    "docker": "install Docker Engine with the NVIDIA container toolkit",
    "apptainer": "ask the cluster's support for Apptainer, or install it from its packages",
    "enroot": "ask the cluster's support for enroot and the pyxis plugin of Slurm",
}
"""Commands that are looked up on PATH, each with the way to get it."""

ALIASES = {
    "apptainer": ("apptainer", "singularity"),
    "chromium": ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"),
}
"""Other names of the same command."""


@dataclass(frozen=True)
class Gpu:
    """One GPU as ``nvidia-smi`` tells it."""

    name: str
    driver: str
    memory_mib: int
    compute_capability: str


def machine_checks(runs: Path) -> list[Check]:
    """Check the interpreter, the processor, memory and the folders that are written to."""
    return [
        python_check(),
        cores_check(),
        memory_check(),
        instructions_check(),
        disk_check("free disk at the runs folder", runs, MIN_DISK_GIB),
        writable_check("runs folder writable", runs),
        disk_check("free disk for temporary files", Path(tempfile.gettempdir()), 2),
        open_files_check(),
        launcher_check(os.environ),
    ]


def python_check(version: tuple[int, int] = sys.version_info[:2]) -> Check:
    """Compare the interpreter with the supported range."""
    low, high = PYTHON_RANGE
    shown = ".".join(map(str, version))
    if low <= version < high:
        return Check("python", "ok", shown)
    limits = f"at least {low[0]}.{low[1]} and below {high[0]}.{high[1]}"
    return Check("python", "fail", f"{shown}; supported: {limits}", "use Python 3.12")


def cores_check() -> Check:
    """Count the cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    if cores >= 2:
        return Check("cores", "ok", f"{cores} usable")
    return Check("cores", "warn", "1 usable core", "give the job two cores or more")


def memory_limit_bytes(cgroup: Path = Path("/sys/fs/cgroup/memory.max")) -> int | None:
    """Memory this process may use: the machine's, or the container's limit if that is less."""
    total = memory_bytes()
    try:
        limit = int(cgroup.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such file, or the word "max"
        return total
    return min(limit, total) if total else limit


def memory_check() -> Check:
    """Compare memory with what the quickstart needs."""
    limit = memory_limit_bytes()
    if limit is None:
        return Check("memory", "warn", "the system does not tell", "check that 8 GiB are free")
    shown = f"{limit / GIB:.1f} GiB"
    if limit >= MIN_MEMORY_GIB * GIB:
        return Check("memory", "ok", shown)
    return Check(
        "memory",
        "warn",
        f"{shown}, below the {MIN_MEMORY_GIB} GiB of the quickstart",
        f"run where {MIN_MEMORY_GIB} GiB are free, or lower block_tokens and the batch size",
    )


def instructions_check(cpuinfo: Path = Path("/proc/cpuinfo")) -> Check:
    """Look for the wide and bf16 instructions that make CPU runs bearable."""
    name, wanted = "CPU instructions", ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return Check(name, "ok", "not told by this system")
    flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    present = [flag for flag in wanted if flag in flags]
    if {"avx512_bf16", "amx_bf16", "bf16"} & set(flags):
        return Check(name, "ok", ", ".join(present) or "bf16")
    shown = ", ".join(present) or "none of " + ", ".join(wanted)
    return Check(
        name,
        "warn",
        f"{shown}; bf16 is emulated and slow",
        "set the training dtype to float32 on this CPU, or use a GPU",
    )


def existing_parent(path: Path) -> Path:
    """Nearest folder at or above ``path`` that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def disk_check(name: str, folder: Path, minimum_gib: int) -> Check:
    """Compare free disk space with ``minimum_gib``."""
    free = shutil.disk_usage(existing_parent(folder)).free
    shown = f"{free / GIB:.1f} GiB free"
    if free >= minimum_gib * GIB:
        return Check(name, "ok", shown)
    return Check(
        name,
        "warn" if free >= GIB else "fail",
        f"{shown}, below {minimum_gib} GiB",
        "free disk space, or write to another file system",
    )


def writable_check(name: str, folder: Path) -> Check:
    """Write and remove a temporary file where ``folder`` is or would be made."""
    parent = existing_parent(folder)
    try:
        with tempfile.TemporaryFile(dir=parent) as file:
            file.write(b"1")
    except OSError as error:
        return Check(name, "fail", f"{parent}: {error.strerror}", "choose a folder of your own")
    return Check(name, "ok", str(folder))


def open_files_check() -> Check:
    """Read the limit of open files: sharded checkpoints and data loaders need many."""
    name = "open files limit"
    if sys.platform == "win32":
        return Check(name, "ok", "not limited by this system")
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft in (-1, resource.RLIM_INFINITY) or soft >= MIN_OPEN_FILES:
        return Check(name, "ok", "unlimited" if soft < 0 else str(soft))
    return Check(name, "warn", f"{soft}, below {MIN_OPEN_FILES}", f"ulimit -n {MIN_OPEN_FILES}")


def launcher_check(variables: Mapping[str, str]) -> Check:
    """Find launcher variables that make single-process tools start a process group."""
    name = "launcher variables"
    present = [variable for variable in LAUNCHER_VARIABLES if variable in variables]
    if not present:
        return Check(name, "ok", "none set")
    return Check(
        name,
        "warn",
        f"set: {', '.join(present)}; quantization and export run in one process",
        f"unset {' '.join(present)} for stages that do not train",
    )


def gpus(timeout_s: float = 10.0) -> list[Gpu]:
    """Ask ``nvidia-smi`` for the GPUs; none where it is absent or fails."""
    executable = shutil.which("nvidia-smi")
    if executable is None:
        return []
    fields = "name,driver_version,memory.total,compute_cap"
    command = [executable, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_gpus(done.stdout) if done.returncode == 0 else []


def parse_gpus(text: str) -> list[Gpu]:
    """Read the CSV lines of ``nvidia-smi --query-gpu``; lines of another form are left out."""
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4 and parts[2].isdigit():
            found.append(Gpu(parts[0], parts[1], int(parts[2]), parts[3]))
    return found


def gpu_check(found: list[Gpu]) -> Check:
    """Describe the GPUs and their driver."""
    if found:
        first = found[0]
        detail = (
            f"{len(found)} x {first.name}, {first.memory_mib / 1024:.0f} GiB, compute capability "
            f"{first.compute_capability}, driver {first.driver}"
        )
        return Check("GPU and driver", "ok", detail)
    if shutil.which("nvidia-smi"):
        return Check(
            "GPU and driver",
            "warn",
            "nvidia-smi is present but names no GPU",
            "run nvidia-smi by hand and read its message: often driver and kernel disagree",
        )
    return Check(
        "GPU and driver",
        "missing",
        "no nvidia-smi on PATH: everything runs on the CPU",
        "use a machine with an NVIDIA driver; in a container start it with --gpus all or --nv",
    )


def which(command: str) -> str | None:
    """Path of ``command`` or of one of its aliases."""
    names = ALIASES.get(command, (command,))
    return next((path for name in names if (path := shutil.which(name))), None)


def command_checks() -> list[Check]:
    """Look for the commands that deployment stages and launch scripts start."""
    checks = [_command_check(command, remedy) for command, remedy in COMMANDS.items()]
    chromium = _command_check(
        "chromium", "optional: install Chromium to test the report in a browser"
    )
    return [*checks, chromium]


def _command_check(command: str, remedy: str) -> Check:
    path = which(command)
    if path is None:
        return Check(f"command {command}", "missing", "not on PATH", remedy)
    return Check(f"command {command}", "ok", Path(path).name)


def hub_checks(variables: Mapping[str, str]) -> list[Check]:
    """Report whether models may be downloaded, and where they are kept."""
    offline = [
        name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_on(variables, name)
    ]
    mode = f"offline ({', '.join(offline)})" if offline else "online: hub ids may be downloaded"
    cache = hub_cache(variables)
    folder = writable_check("Hugging Face cache", cache)
    if folder.status == "fail":
        folder = Check(folder.name, "warn", folder.detail, "set HF_HOME to a folder of your own")
    return [Check("Hugging Face mode", "ok", mode), folder]


def hub_cache(variables: Mapping[str, str]) -> Path:
    """Folder in which huggingface_hub keeps downloads, by its documented variables."""
    if explicit := variables.get("HF_HUB_CACHE"):
        return Path(explicit)
    default = Path(variables.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(variables.get("HF_HOME") or default) / "hub"


def _is_on(variables: Mapping[str, str], name: str) -> bool:
    return variables.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}
