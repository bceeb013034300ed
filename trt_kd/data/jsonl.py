"""JSON lines."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from trt_kd.data.source import DataSource, digest_of_files, matching_files, read_utf8
from trt_kd.errors import DataError


class JsonLines(DataSource):
    """JSONL files: one object a line, the document in one of its fields."""

    holds_fields: ClassVar[bool] = True

    kind: Literal["jsonl"] = "jsonl"
    files: Annotated[list[str], Field(min_length=1)]
    """Paths or globs, relative to the folder the command runs in."""
    field: str = "text"
    """Name of the field that holds the text."""

    def documents(self) -> list[str]:
        """Texts in the order of files and lines."""
        return [text for text, _ in self.rows()]

    def rows(self) -> list[tuple[str, dict[str, Any]]]:
        """Every document with the whole object of its line."""
        return [row for path in matching_files(self.files) for row in self._rows(path)]

    def beside(self, field: str) -> dict[str, str]:
        """See the base class; what is no text counts as it is written in JSON, null as nothing."""
        found: dict[str, str] = {}
        for text, row in self.rows():
            if (value := row.get(field)) is None:
                continue
            told = value if isinstance(value, str) else json.dumps(value)
            if found.setdefault(text, told) != told:
                raise DataError(
                    f"field {field!r} says both {found[text]!r} and {told!r} of {text[:40]!r}",
                    hint="leave one of these lines out",
                )
        if not found:
            raise DataError(
                f"no line of {', '.join(self.files)} holds anything in field {field!r}",
                hint="name the field that holds it",
            )
        return found

    def fingerprint(self) -> str:
        """sha256 of the files' contents."""
        return digest_of_files(matching_files(self.files))

    def _rows(self, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, line in enumerate(read_utf8(path).split("\n"), start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"{where} is not valid JSON: {error}", hint="write one JSON object on a line"
                ) from error
            if not isinstance(row, dict) or not isinstance(row.get(self.field), str):
                keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
                raise DataError(
                    f"{where} holds no text in field {self.field!r}; it holds {keys}",
                    hint="name the field that holds the text as data.source.field",
                )
            if text := row[self.field].strip():
                yield text, row
