"""Plain text files."""

import re
from typing import Annotated, Literal

from pydantic import Field

from trt_kd.data.source import DataSource, digest_of_files, matching_files, read_utf8

BLANK_LINES = re.compile(r"\n\s*\n")


class TextFiles(DataSource):
    """UTF-8 text files; documents are separated by blank lines."""

    kind: Literal["text"] = "text"
    files: Annotated[list[str], Field(min_length=1)]
    """Paths or globs (``corpus/**/*.txt``), relative to the folder the command runs in."""

    def documents(self) -> list[str]:
        """Paragraphs in the order of files and lines."""
        texts = map(read_utf8, matching_files(self.files))
        pieces = (piece.strip() for text in texts for piece in BLANK_LINES.split(text))
        return [piece for piece in pieces if piece]

    def fingerprint(self) -> str:
        """sha256 of the files' contents."""
        return digest_of_files(matching_files(self.files))
