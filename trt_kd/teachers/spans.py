"""Where two tokenizers cut the same bytes at the same place.

Shape suffixes: L tokens of a block.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from trt_kd.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Reading:
    """One block of the student's tokens as the teacher reads it."""

    ids: list[int]
    """The teacher's tokens."""
    pairs: list[tuple[int, int]]
    """Positions, student's and teacher's, after which both have read the same bytes; ascending."""


@dataclass(frozen=True)
class Translator:
    """Gives the teacher the text of the student's tokens."""

    student: "PreTrainedTokenizerBase"
    teacher: "PreTrainedTokenizerBase"

    def __post_init__(self) -> None:
        """Check that both know what ends a text.

        Raises:
            ModelError: if one does not.
        """
        for role, tokenizer in (("student", self.student), ("teacher", self.teacher)):
            if tokenizer.eos_token_id is None:
                raise ModelError(
                    f"the {role}'s tokenizer has no token that ends a text",
                    hint="name one as eos_token in its tokenizer_config.json",
                )

    def read(self, tokens_L: Sequence[int]) -> Reading:
        """Tokenize the bytes of ``tokens_L`` anew and find the common boundaries.

        Texts in a block, told apart by the token that ends them, are read one by one; that token
        becomes the teacher's. A text whose bytes the teacher's tokens do not give back, because its
        tokenizer changes or lacks some, has no boundary but its end.
        """
        ids, ends = [*self._beginning], [-1] * len(self._beginning)
        for start, data in self._texts(tokens_L):
            made, offsets = self._tokenized(data)
            ids += made
            ends += [-1 if offset is None else start + offset for offset in offsets]
            ids.append(int(self._teacher_end))
            ends.append(start + len(data) + 1)
        ids, ends = ids[:-1], ends[:-1]  # the last text goes on behind the block
        last = {end: place for place, end in enumerate(ends) if end > 0}
        pairs = [(place, last[end]) for end, place in self._ends(tokens_L).items() if end in last]
        return Reading(ids, sorted(pairs))

    def _texts(self, tokens_L: Sequence[int]) -> list[tuple[int, bytes]]:
        """Bytes of each text and where it starts; a token that ends a text counts as one byte."""
        found, start, parts = [], 0, [b""]
        for token in tokens_L:
            if token == self.student.eos_token_id:
                found.append((start, b"".join(parts)))
                start, parts = start + len(found[-1][1]) + 1, [b""]
            else:
                parts.append(self._student_bytes[token])
        return [*found, (start, b"".join(parts))]

    def _ends(self, tokens_L: Sequence[int]) -> dict[int, int]:
        """The last position that ends at each byte."""
        end, found = 0, {}
        for place, token in enumerate(tokens_L):
            eos = token == self.student.eos_token_id
            end += 1 if eos else len(self._student_bytes[token])
            found[end] = place
        return found

    def _tokenized(self, data: bytes) -> tuple[list[int], list[int | None]]:
        """The teacher's tokens of one text and the byte at which each ends, None if not known."""
        first, text = _decoded(data)
        given: Any = self.teacher(text, add_special_tokens=False, verbose=False)
        ids: list[int] = given["input_ids"]
        parts = [self._teacher_bytes[token] for token in ids]
        whole, wanted = b"".join(parts), text.encode()
        if whole not in (wanted, b" " + wanted):
            return ids, [None] * len(ids)
        end, offsets = first - (len(whole) - len(wanted)), []
        for part in parts:
            end += len(part)
            offsets.append(end)
        return ids, list(offsets)

    @property
    def _teacher_end(self) -> int:
        return self.teacher.eos_token_id  # type: ignore[no-any-return]

    @cached_property
    def _beginning(self) -> list[int]:
        """The token that the teacher is used to begin with, if there is one."""
        plain: Any = self.teacher("a")
        first = plain["input_ids"][:1]
        return first if first == [self.teacher.bos_token_id] else []

    @cached_property
    def _student_bytes(self) -> list[bytes]:
        return token_bytes(self.student)

    @cached_property
    def _teacher_bytes(self) -> list[bytes]:
        return token_bytes(self.teacher)


def token_bytes(tokenizer: "PreTrainedTokenizerBase") -> list[bytes]:
    """Bytes that every token stands for, for byte-level and for SentencePiece vocabularies.

    Raises:
        ModelError: if there is no fast tokenizer to ask.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{type(tokenizer).__name__} is no fast tokenizer", hint="write its tokenizer.json"
        )
    byte_level = '"ByteLevel"' in json.dumps(json.loads(backend.to_str())["decoder"])
    table = {char: byte for byte, char in _byte_characters().items()}
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    found = [b""] * (max([*tokenizer.get_vocab().values()]) + 1)
    for token, number in tokenizer.get_vocab().items():
        if number in added:
            found[number] = added[number].content.encode()
        elif byte_level:
            found[number] = bytes(table[char] for char in token if char in table)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            found[number] = bytes([int(token[3:5], 16)])
        else:
            found[number] = token.replace("▁", " ").encode()
    return found


def _byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + number) for number, byte in enumerate(others)
    }


def _decoded(data: bytes) -> tuple[int, str]:
    """Text and where it begins, without parts of characters that the block's edges cut."""
    first = 0
    while first < min(3, len(data)) and data[first] & 0xC0 == 0x80:
        first += 1
    last = len(data)
    for back in range(1, min(3, last - first) + 1):
        byte = data[last - back]
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            last -= back if length > back else 0
        if byte & 0xC0 != 0x80:
            break
    return first, data[first:last].decode(errors="replace")
