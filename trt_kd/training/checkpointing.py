"""Training checkpoints that a kill cannot spoil.

A kill may fall into the middle of a save. So a checkpoint counts only once a marker stands in it,
written after all its files reached the disk, which names their sizes and digests. Older
checkpoints are removed after that, never before.
"""

import json
import logging
import os
import shutil
from pathlib import Path

from trt_kd.artifacts import claim_work
from trt_kd.artifacts.manifest import sha256_of
from trt_kd.errors import ArtifactError

logger = logging.getLogger(__name__)

MARKER = "complete.json"
PREFIX = "checkpoint-"
BYTES_PER_PARAMETER = 12
"""Weight and two moments of AdamW, float32 each."""


def claim(work: Path, key: str) -> Path:
    """Give the folder ``work`` to the work with identity ``key``; return its checkpoint folder.

    What another work left there is removed: its checkpoints must not be taken up.
    """
    claim_work(work, key)
    checkpoints = work / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    return checkpoints


def check_space(folder: Path, parameters: int) -> None:
    """Check that two checkpoints of a model of that size fit on the disk of ``folder``.

    Raises:
        ArtifactError: if they do not.
    """
    needed = 2 * BYTES_PER_PARAMETER * parameters
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ArtifactError(
            f"training needs {needed / 1e9:.1f} GB for two checkpoints in {folder}, "
            f"{free / 1e9:.1f} GB are free",
            hint="free disk space or choose an output folder on another disk",
        )


def mark_complete(checkpoint: Path) -> None:
    """Sync every file of ``checkpoint`` to disk, then write the marker and rename it into place."""
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            _sync(path)
            name = path.relative_to(checkpoint).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    draft = checkpoint / f"{MARKER}.partial"
    draft.write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
    _sync(draft)
    draft.rename(checkpoint / MARKER)
    _sync(checkpoint)


def is_complete(checkpoint: Path) -> bool:
    """Say whether the marker stands and every file is as it says."""
    try:
        marker = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        files = [(checkpoint / name, was) for name, was in marker["files"].items()]
        sizes = all(path.stat().st_size == was["bytes"] for path, was in files)
        return sizes and all(sha256_of(path) == was["sha256"] for path, was in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def newest_complete(checkpoints: Path) -> Path | None:
    """Newest checkpoint that is complete, or None; newer incomplete ones are removed."""
    for path in sorted(checkpoints.glob(f"{PREFIX}*"), key=step_of, reverse=True):
        if is_complete(path):
            return path
        logger.warning("%s is incomplete; it is removed", path)
        shutil.rmtree(path)
    return None


def remove_older(checkpoints: Path, than: Path) -> None:
    """Remove every checkpoint but ``than``."""
    for path in checkpoints.glob(f"{PREFIX}*"):
        if path != than:
            shutil.rmtree(path)


def step_of(checkpoint: Path) -> int:
    """Step after which it was written, -1 where the name does not tell."""
    number = checkpoint.name.removeprefix(PREFIX)
    return int(number) if number.isdigit() else -1


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
