"""Rows of top-k log-probabilities as few bytes, and back, without a loop over rows.

Tokens of a row are a set, so their ids are stored ascending as gaps. Probabilities are levels of
the fourth root of p: in between log p (even relative errors, levels spent on tokens that hardly
count) and the square root (least expected KL for given bytes, but no resolution below 1e-5). The
tail is a bucket like the others and all are scaled to sum to one, so its error stays relative too.
Draws from the tail are ids, ascending as gaps too, and the tail's entropy in 255ths of the largest.
Low and high bytes of the gaps, the levels and the entropies are planes apart, each with Huffman
codes of its own.

Shape suffixes: T positions, K kept tokens, B kept tokens and tail, M drawn tokens.
"""

import zlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LEVELS = 95
"""Levels between p = 0 and 1; the least is 95 to the power of -4, or -18.2 nats."""
_EFFORT = 6


class Kept(NamedTuple):
    """What is kept of the rows of one sample."""

    ids: NDArray[np.int64]
    """Kept tokens ``[T, K]``."""
    logp: NDArray[np.float32]
    """Their log-probabilities ``[T, K]``, in nats."""
    tail: NDArray[np.float32]
    """Log-mass of all other tokens ``[T]``."""
    drawn: NDArray[np.int64]
    """Tokens drawn among the others ``[T, M]``; M may be 0."""
    entropy: NDArray[np.float32]
    """Entropy of the others' distribution in nats ``[T]``; 0 where nothing is drawn."""

    @classmethod
    def without_draws(
        cls, ids: NDArray[np.int64], logp: NDArray[np.float32], tail: NDArray[np.float32]
    ) -> "Kept":
        """Rows of which the likeliest tokens alone are known."""
        return cls(ids, logp, tail, np.empty((len(ids), 0), np.int64), np.zeros_like(tail))


def encode(rows: Kept, size: int) -> bytes:
    """Encode the rows of one sample; ``size`` is that of the vocabulary."""
    order_TK = np.argsort(rows.ids, -1)
    sorted_TK = np.take_along_axis(rows.ids, order_TK, -1)
    gaps_TK = np.diff(sorted_TK, axis=-1, prepend=-1) - 1
    logp_TB = np.concatenate(
        (np.take_along_axis(rows.logp, order_TK, -1), rows.tail[:, None]), -1, dtype=np.float32
    )
    levels_TB = np.maximum(np.rint(LEVELS * np.exp(logp_TB / 4)), 1).astype(np.uint8)
    planes = [*_bytes_of(gaps_TK, size), levels_TB]
    if rows.drawn.shape[1]:
        gaps_TM = np.diff(np.sort(rows.drawn, -1), axis=-1, prepend=0).astype(np.int64)
        share_T = np.rint(255 * rows.entropy / np.log(size)).clip(0, 255).astype(np.uint8)
        planes += [*_bytes_of(gaps_TM, size), share_T]
    packer = zlib.compressobj(_EFFORT)
    packed = b""
    for plane in planes:  # the flush ends the Huffman codes of the plane before
        packed += packer.compress(plane.tobytes()) + packer.flush(zlib.Z_SYNC_FLUSH)
    return packed + packer.flush()


def decode(packed: bytes, *, rows: int, k: int, size: int, draws: int = 0) -> Kept:
    """What was encoded: ``k`` tokens a row, ids ascending, and ``draws`` of the others.

    The masses of a row sum to one; where K is the vocabulary the tail is minus infinity.

    Raises:
        ValueError: if the bytes are not those of ``rows`` such rows.
    """
    try:
        raw = np.frombuffer(zlib.decompress(packed), dtype=np.uint8)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    planes, entropies = _planes(size), rows if draws else 0
    sizes = (planes * rows * k, rows * (k + 1), planes * rows * draws, entropies)
    if len(raw) != sum(sizes):
        raise ValueError(f"{len(raw)} bytes for {rows} rows of {k} tokens and {draws} draws")
    ids, levels, drawn, shares = np.split(raw, np.cumsum(sizes[:-1]))
    ids_TK = (_of_bytes(ids, planes, rows, k) + 1).cumsum(-1)
    ids_TK -= 1
    levels_TB = levels.reshape(rows, k + 1)
    if k == size:
        levels_TB = levels_TB * (np.arange(k + 1) < k)
    total_T1 = _MASS.take(levels_TB).sum(-1, keepdims=True)
    logp_TB = _LOG_MASS.take(levels_TB) - np.log(total_T1)
    drawn_TM = _of_bytes(drawn, planes, rows, draws).cumsum(-1)
    entropy_T = np.zeros(rows, np.float32)
    entropy_T[: len(shares)] = shares * np.float32(np.log(size) / 255)
    return Kept(ids_TK, logp_TB[:, :k], logp_TB[:, k], drawn_TM, entropy_T)


def bytes_per_row(k: int, size: int, draws: int = 0) -> float:
    """Upper estimate: a set of ``k`` ids and a set of draws, all sets alike, and a byte per number.

    ``log2 C(size, k)`` is at most ``k log2(e size / k)``; real rows take about 0.75 of it.
    """
    ids = sum(n * float(np.log2(np.e * size / n)) / 8 for n in (k, draws) if n)
    return ids + k + 1 + (1 if draws else 0)


def _bytes_of(gaps: NDArray[np.int64], size: int) -> list[NDArray[np.uint8]]:
    """Low bytes first."""
    return [(gaps >> (8 * place)).astype(np.uint8) for place in range(_planes(size))]


def _of_bytes(raw: NDArray[np.uint8], planes: int, rows: int, columns: int) -> NDArray[np.int64]:
    """The numbers of ``_bytes_of``, ``[rows, columns]``."""
    parts = raw.reshape(planes, rows, columns)
    gaps: NDArray[np.int64] = parts[0].astype(np.int64)
    for place in range(1, planes):
        gaps |= parts[place].astype(np.int64) << (8 * place)
    return gaps


def _planes(size: int) -> int:
    """Bytes of the largest gap."""
    return max(1, (size - 1).bit_length() + 7) // 8


_SHARES = np.arange(256, dtype=np.float64) / LEVELS
_MASS = (_SHARES**4).astype(np.float32)
_LOG_MASS = np.log(_SHARES**4, out=np.full(256, -np.inf), where=_SHARES > 0).astype(np.float32)
