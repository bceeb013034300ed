"""Text that every machine has: the docstrings of Python's own standard library."""

import ast
import hashlib
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

from trt_kd.data.source import DataSource
from trt_kd.errors import DataError

LEFT_OUT = frozenset({"test", "tests", "idlelib", "site-packages", "dist-packages"})
MIN_CHARACTERS = 120


class StdlibDocstrings(DataSource):
    """Docstrings of the standard library, above 120 characters: about 1.5 MB of English."""

    kind: Literal["stdlib_docstrings"] = "stdlib_docstrings"

    def documents(self) -> list[str]:
        """Docstrings in the order of modules and of lines, each text once."""
        return list(_docstrings(sysconfig.get_path("stdlib")))

    def fingerprint(self) -> str:
        """Version of Python with the names and sizes of its modules: systems ship fewer or more."""
        return _fingerprint(Path(sysconfig.get_path("stdlib")))


@cache
def _fingerprint(root: Path) -> str:
    sizes = [
        f"{path.relative_to(root).as_posix()} {path.stat().st_size}" for path in _modules(root)
    ]
    digest = hashlib.sha256("\n".join(sizes).encode()).hexdigest()
    return f"{platform.python_implementation()} {platform.python_version()} {digest[:16]}"


@cache
def _modules(root: Path) -> tuple[Path, ...]:
    """Modules below ``root``, sorted; folders left out are not entered: they may be huge."""
    paths: list[Path] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        paths += [Path(folder, name) for name in files if name.endswith(".py")]
    return tuple(sorted(paths))


@cache
def _docstrings(directory: str) -> tuple[str, ...]:
    root = Path(directory)
    found: dict[str, None] = {}
    for path in _modules(root):
        found.update(dict.fromkeys(_docstrings_of(path)))
    if not found:
        raise DataError(
            f"{root} holds no Python source with docstrings",
            hint="this Python keeps its library compiled or zipped; use another data source",
        )
    return tuple(found)


def _docstrings_of(path: Path) -> Iterator[str]:
    """Docstrings of one module; a file that is no valid module (a template) has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in _statements(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = (ast.get_docstring(node) or "").strip()
            if len(text) > MIN_CHARACTERS:
                yield text


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """``node`` and the statements inside it; five times as fast as ``ast.walk``."""
    yield node
    for block in ("body", "handlers", "orelse", "finalbody"):
        inside = getattr(node, block, None)
        if isinstance(inside, list):
            for child in inside:
                yield from _statements(child)
