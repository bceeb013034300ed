"""What every data source is: settings that can name, fingerprint and read their documents."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from glob import glob
from pathlib import Path
from typing import ClassVar, NamedTuple

from trt_kd.artifacts.manifest import sha256_of
from trt_kd.config import Plugin
from trt_kd.errors import DataError

_MAY_READ = "data.source must name files that you may read"


class Traced(NamedTuple):
    """Parts of a text that thinks and then answers."""

    prompt: str
    thought: str
    answer: str


class DataSource(Plugin, ABC):
    """A place that documents come from; it knows nothing about splits, tokens or models."""

    holds_traces: ClassVar[bool] = False
    """Whether ``traced`` may know the parts of its texts."""
    holds_fields: ClassVar[bool] = False
    """Whether ``beside`` may know what stands in a field beside its texts."""

    @abstractmethod
    def documents(self) -> Sequence[str]:
        """Every document, in an order that does not change from run to run.

        One that is empty counts as none. Where there may be more text than memory they are
        ``LazyTexts``.

        Raises:
            DataError: if the text is missing or cannot be read.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Identity of the text, found without torch and without reading more than is needed.

        Raises:
            DataError: if the text is missing.
        """

    def traced(self) -> dict[str, Traced]:
        """Prompt, trace and answer of every document that has them, by the document."""
        return {}

    def beside(self, field: str) -> dict[str, str]:
        """What stands in ``field`` beside a document, by the document; those without it left out.

        Raises:
            DataError: if no document has it, or one has two.
        """
        return {}


def matching_files(patterns: Iterable[str]) -> list[Path]:
    """Files that ``patterns`` (paths or globs, ``**`` allowed) name, sorted, each once.

    Raises:
        DataError: naming the first pattern that matches no file.
    """
    found: set[Path] = set()
    for pattern in patterns:
        paths = [path for path in map(Path, glob(pattern, recursive=True)) if path.is_file()]
        if not paths:
            raise DataError(
                f"{pattern!r} names no file",
                hint="paths are relative to the folder that the command runs in",
            )
        found.update(paths)
    return sorted(found)


def digest_of_files(paths: Iterable[Path]) -> str:
    """sha256 over the contents of ``paths`` in their order; names and times do not matter.

    Raises:
        DataError: if a file cannot be read.
    """
    try:
        digests = [sha256_of(path) for path in paths]
    except OSError as error:
        raise DataError(
            f"{error.filename} cannot be read: {error.strerror}", hint=_MAY_READ
        ) from error
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def read_utf8(path: Path) -> str:
    """Text of ``path``, a byte order mark left out.

    Raises:
        DataError: if it cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", hint=_MAY_READ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: {error.reason} at byte {error.start:,}",
            hint="convert it, for instance with iconv -t utf-8",
        ) from error
