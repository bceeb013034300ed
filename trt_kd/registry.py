"""One registry idiom for every family: a literal table from name to ``module:attribute``."""

import ast
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Generic, TypeVar, cast

from trt_kd.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """Members of one family, imported one at a time when asked for.

    A name with a colon is the user's own code: ``my_package.losses:MyLoss``.
    """

    def __init__(self, what: str, table: Mapping[str, str]) -> None:
        self.what = what
        self._table = dict(table)

    def names(self) -> list[str]:
        """Registered names in the order of the table."""
        return list(self._table)

    def load(self, name: str) -> T:
        """Import and return the member registered as ``name``.

        Raises:
            ConfigError: if the name is unknown, or a user's own target cannot be imported.
        """
        target = self._table.get(name, name)
        if ":" not in target:
            close = get_close_matches(name, self._table, n=1, cutoff=0.5)
            raise ConfigError(
                f"unknown {self.what} {name!r}; available: {', '.join(self.names())}",
                hint=f"did you mean {close[0]!r}?" if close else None,
            )
        module, _, attribute = target.partition(":")
        try:
            return cast("T", getattr(import_module(module), attribute))
        except (ModuleNotFoundError, AttributeError) as error:
            if name in self._table:
                raise
            raise ConfigError(
                f"{self.what} {name!r} cannot be imported: {error}",
                hint="write it as package.module:Name, with the package on PYTHONPATH",
            ) from error

    def summary(self, name: str) -> str:
        """First docstring line of member ``name``, read from its source without importing it."""
        module, _, attribute = self._table[name].partition(":")
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            raise ConfigError(f"{self.what} {name!r}: module {module} does not exist")
        for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == attribute:
                return (ast.get_docstring(node) or "").partition("\n")[0]
        raise ConfigError(f"{self.what} {name!r}: {module} defines no {attribute}")
