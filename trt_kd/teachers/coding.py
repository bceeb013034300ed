"""Rows of top-k log-probabilities as few bytes, and back, without a loop over rows.

Tokens of a row are a set, so their ids are stored ascending as gaps. Probabilities are levels of
the fourth root of p: in between log p (even relative errors, levels spent on tokens that hardly
count) and the square root (least expected KL for given bytes, but no resolution below 1e-5). The
tail is a bucket like the others and all are scaled to sum to one, so its error stays relative too.
Low and high bytes of the gaps and the levels are planes apart, each with Huffman codes of its own.

Shape suffixes: T positions, K kept tokens, B kept tokens and tail, P byte planes.
"""

import zlib

import numpy as np
from numpy.typing import NDArray

LEVELS = 95
"""Levels between p = 0 and 1; the least is 95 to the power of -4, or -18.2 nats."""
_EFFORT = 6


def encode(
    ids_TK: NDArray[np.int64], logp_TK: NDArray[np.float32], tail_T: NDArray[np.float32], size: int
) -> bytes:
    """Encode the rows of one sample; ``size`` is that of the vocabulary."""
    order_TK = np.argsort(ids_TK, -1)
    sorted_TK = np.take_along_axis(ids_TK, order_TK, -1)
    gaps_TK = np.diff(sorted_TK, axis=-1, prepend=-1) - 1
    logp_TB = np.concatenate(
        (np.take_along_axis(logp_TK, order_TK, -1), tail_T[:, None]), -1, dtype=np.float32
    )
    levels_TB = np.maximum(np.rint(LEVELS * np.exp(logp_TB / 4)), 1).astype(np.uint8)
    planes = [(gaps_TK >> (8 * place)).astype(np.uint8) for place in range(_planes(size))]
    packer = zlib.compressobj(_EFFORT)
    packed = b""
    for plane in (*planes, levels_TB):  # the flush ends the Huffman codes of the plane before
        packed += packer.compress(plane.tobytes()) + packer.flush(zlib.Z_SYNC_FLUSH)
    return packed + packer.flush()


def decode(
    packed: bytes, *, rows: int, k: int, size: int
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    """Ids ascending ``[T, K]``, log-probabilities ``[T, K]`` and log-mass of the tail ``[T]``.

    The masses of a row sum to one; where K is the vocabulary the tail is minus infinity.

    Raises:
        ValueError: if the bytes are not those of ``rows`` rows of ``k`` tokens.
    """
    try:
        raw = np.frombuffer(zlib.decompress(packed), dtype=np.uint8)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    count, planes = rows * k, _planes(size)
    if len(raw) != planes * count + rows * (k + 1):
        raise ValueError(f"{len(raw)} bytes for {rows} rows of {k} tokens")
    gaps_TK = raw[:count].astype(np.int64)
    for place in range(1, planes):
        gaps_TK |= raw[place * count : (place + 1) * count].astype(np.int64) << (8 * place)
    gaps_TK += 1
    ids_TK = gaps_TK.reshape(rows, k).cumsum(-1)
    ids_TK -= 1
    levels_TB = raw[planes * count :].reshape(rows, k + 1)
    if k == size:
        levels_TB = levels_TB * (np.arange(k + 1) < k)
    total_T1 = _MASS.take(levels_TB).sum(-1, keepdims=True)
    logp_TB = _LOG_MASS.take(levels_TB) - np.log(total_T1)
    return ids_TK, logp_TB[:, :k], logp_TB[:, k]


def bytes_per_row(k: int, size: int) -> float:
    """Upper estimate: a set of ``k`` ids, all sets alike, and a byte per probability.

    ``log2 C(size, k)`` is at most ``k log2(e size / k)``; real rows take about 0.75 of it.
    """
    return k * float(np.log2(np.e * size / k)) / 8 + k + 1


def _planes(size: int) -> int:
    """Bytes of the largest gap."""
    return max(1, (size - 1).bit_length() + 7) // 8


_SHARES = np.arange(256, dtype=np.float64) / LEVELS
_MASS = (_SHARES**4).astype(np.float32)
_LOG_MASS = np.log(_SHARES**4, out=np.full(256, -np.inf), where=_SHARES > 0).astype(np.float32)
