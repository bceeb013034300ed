"""State beside an artifact in the making that outlives a kill, in pieces that are whole or absent.

A stage's work directory belongs to one piece of work, by its key. Inside it a folder counts once
its ``result.json`` stands: that is written last, before the folder is renamed into place.
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trt_kd.artifacts.artifact import sync, sync_tree

RESULT = "result.json"
_KEY = "work_key"

logger = logging.getLogger(__name__)


def claim_work(work: Path, key: str) -> Path:
    """Give the folder ``work`` to the work with identity ``key``; return it.

    What another work left there is removed: its state must not be taken up.
    """
    owner = work / _KEY
    if work.is_dir() and not (owner.is_file() and owner.read_text(encoding="utf-8") == key):
        logger.warning("%s holds state of other settings; it is removed", work)
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    owner.write_text(key, encoding="utf-8")
    return work


def piece(folder: Path, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """The result of ``make``, which fills a folder, from disk if it was made before."""
    result = folder / RESULT
    if not result.is_file():
        draft = folder.with_name(folder.name + ".partial")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        value = make(draft)
        (draft / RESULT).write_text(json.dumps(value), encoding="utf-8")
        sync_tree(draft)
        sync(draft)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


class Finished:
    """Results of the finished parts of one piece of work, by name.

    Nothing is on disk before the first result is kept.
    """

    def __init__(self, work: Path, key: str) -> None:
        """``work`` is the folder; what another key left there does not count."""
        self._work, self._key = work, key

    def get(self, name: str) -> dict[str, Any] | None:
        """What was kept as ``name``, or None."""
        owner, path = self._work / _KEY, self._work / f"{name}.json"
        if not path.is_file() or not owner.is_file():
            return None
        if owner.read_text(encoding="utf-8") != self._key:
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def keep(self, name: str, value: dict[str, Any]) -> None:
        """Write ``value``, whole or not at all."""
        path = claim_work(self._work, self._key) / f"{name}.json"
        draft = path.with_suffix(".partial")
        draft.write_text(json.dumps(value), encoding="utf-8")
        sync(draft)
        draft.replace(path)
        sync(path.parent)
