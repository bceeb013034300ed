"""The doctor: what this machine is, what it can do, and one fix for each thing it lacks.

Nothing heavy is imported: versions come from package metadata, commands from PATH. With
``deep=True`` each package is imported in a child process, which finds broken builds.
"""

import os
from pathlib import Path
from typing import Any

from trt_kd.artifacts.environment import environment
from trt_kd.doctor.capabilities import capabilities
from trt_kd.doctor.check import Capability, Check, Status, document, render, render_capabilities
from trt_kd.doctor.machine import command_checks, gpu_check, gpus, hub_checks, machine_checks
from trt_kd.doctor.packages import (
    flavour_checks,
    package_checks,
    teacher_check,
    torch_build_check,
)

__all__ = [
    "Capability",
    "Check",
    "Status",
    "capabilities",
    "checks",
    "render",
    "render_capabilities",
    "to_json",
]


def checks(*, deep: bool = False, runs: Path = Path("runs")) -> list[Check]:
    """Look at the machine and its packages; ``runs`` is the folder that runs are written to.

    Quick (at most 3 s) unless ``deep``, which imports every package in a child process.
    """
    found = gpus()
    return [
        *machine_checks(runs),
        gpu_check(found),
        torch_build_check(gpu_present=bool(found)),
        *package_checks(deep=deep),
        *flavour_checks(),
        teacher_check(),
        *hub_checks(os.environ),
        *command_checks(),
    ]


def to_json(found: list[Check] | None = None) -> dict[str, Any]:
    """JSON document of ``found`` (or of a quick look), the capabilities and the environment."""
    return document(checks() if found is None else found, capabilities(), environment())
