"""Texts that stay on disk until they are asked for."""

from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import overload

from typing_extensions import Self

_TOGETHER = 64


class LazyTexts(Sequence[str]):
    """Some documents of a source, by their numbers; kept is eight bytes of each."""

    def __init__(self, read: Callable[[Sequence[int]], list[str]], numbers: Sequence[int]) -> None:
        """``read`` returns the documents of these numbers, in their order."""
        self._read, self._numbers = read, numbers

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._numbers)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> Self: ...
    def __getitem__(self, place: int | slice) -> "str | Self":
        """One document, or some of them unread."""
        if isinstance(place, slice):
            return type(self)(self._read, self._numbers[place])
        return self._read([self._numbers[place]])[0]

    def __iter__(self) -> Iterator[str]:
        """One after another, a few of them in memory."""
        for start in range(0, len(self), _TOGETHER):
            yield from self._read(self._numbers[start : start + _TOGETHER])

    def pick(self, places: Sequence[int]) -> Self:
        """The documents at ``places``, unread."""
        return type(self)(self._read, array("q", [self._numbers[place] for place in places]))


def pick(texts: Sequence[str], places: Sequence[int]) -> Sequence[str]:
    """The texts at ``places``; those on disk stay there."""
    if isinstance(texts, LazyTexts):
        return texts.pick(places)
    return [texts[place] for place in places]
