"""Programs that measure: whether they are here, what they print, and the numbers they report."""

import math
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trt_kd.backends.worker import OutOfMemoryError, out_of_memory
from trt_kd.errors import MissingDependencyError, ServerError

_TOLD_CHARACTERS = 300


def require_program(name: str, hint: str) -> None:
    """Refuse where ``name`` is no program here.

    Raises:
        MissingDependencyError: with ``hint``.
    """
    if shutil.which(name) is None:
        raise MissingDependencyError(f"{name} is not installed here", hint=hint)


def run_program(
    argv: Sequence[str], folder: Path, timeout_s: float, env: Mapping[str, str] | None = None
) -> str:
    """Run a tool in ``folder`` and return what it printed.

    Raises:
        OutOfMemoryError: if it failed and says so.
        ServerError: if it failed otherwise or took longer than ``timeout_s``.
    """
    log = folder / "tool.log"
    with log.open("wb") as file:
        try:
            done = subprocess.run(
                list(argv),
                cwd=folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ServerError(
                f"{argv[0]} did not end within {timeout_s:g} s",
                hint="raise timeout_s, or ask for fewer requests or tokens",
            ) from error
    text = log.read_text(encoding="utf-8", errors="replace")
    if done.returncode:
        told = " ".join(re.sub(r"[^ -~]+", " ", text).split())[-_TOLD_CHARACTERS:]
        kind = OutOfMemoryError if out_of_memory(text) else ServerError
        raise kind(
            f"{argv[0]} ended with code {done.returncode}: {told}",
            hint="try a smaller load where memory is short; else see what it says",
        )
    return text


def numbers_at(report: Mapping[str, Any], places: Mapping[str, str], who: str) -> dict[str, float]:
    """Numbers of a tool's report by our names; what else stands there does not matter.

    Args:
        report: as it was read.
        places: dotted place of each number by our name.
        who: whose report it is, with its version.

    Raises:
        ServerError: naming every place that is missing or holds no finite number.
    """
    found, missing = {}, []
    for name, place in places.items():
        value: Any = report
        for part in place.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, int | float) and math.isfinite(value):
            found[name] = float(value)
        else:
            missing.append(place)
    if missing:
        raise ServerError(
            f"the report of {who} lacks {', '.join(missing)}",
            hint="its format changed: measure with a version that docs/benchmarking.md names",
        )
    return found
