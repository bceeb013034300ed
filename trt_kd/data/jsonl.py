"""JSON lines."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from trt_kd.data.source import DataSource, digest_of_files, matching_files, read_utf8
from trt_kd.errors import DataError


class JsonLines(DataSource):
    """JSONL files: one object a line, the document in one of its fields."""

    kind: Literal["jsonl"] = "jsonl"
    files: Annotated[list[str], Field(min_length=1)]
    """Paths or globs, relative to the folder the command runs in."""
    field: str = "text"
    """Name of the field that holds the text."""

    def documents(self) -> list[str]:
        """Texts in the order of files and lines."""
        return [text for path in matching_files(self.files) for text in self._texts(path)]

    def fingerprint(self) -> str:
        """sha256 of the files' contents."""
        return digest_of_files(matching_files(self.files))

    def _texts(self, path: Path) -> Iterator[str]:
        for number, line in enumerate(read_utf8(path).split("\n"), start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where} is not valid JSON: {error}") from error
            if not isinstance(row, dict) or not isinstance(row.get(self.field), str):
                keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
                raise DataError(
                    f"{where} holds no text in field {self.field!r}; it holds {keys}",
                    hint="name the field that holds the text as data.source.field",
                )
            if text := row[self.field].strip():
                yield text
