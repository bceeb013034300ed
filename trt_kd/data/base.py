"""Splits and token blocks: what every stage that needs text asks for.

A document belongs to a split by the hash of its own text, so held-out text stays held out when
files are added, reordered or read by another stage. The order of documents comes from a hash too:
the same on every machine and under every version of NumPy.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import numpy as np
from pydantic import BeforeValidator, Field, PositiveInt, SerializeAsAny

from trt_kd.config import StrictModel, build_plugin
from trt_kd.data import DATA
from trt_kd.data.docstrings import StdlibDocstrings
from trt_kd.data.lazy import pick
from trt_kd.data.source import DataSource
from trt_kd.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "heldout"]
T = TypeVar("T")

_BATCH = 256
_KEPT = 8


class DataConfig(StrictModel):
    """Text, how much of it is held out, and how long its blocks are."""

    source: Annotated[SerializeAsAny[DataSource], BeforeValidator(partial(build_plugin, DATA))] = (
        StdlibDocstrings()
    )
    """Where documents come from."""
    block_tokens: PositiveInt = 256
    """Tokens of one block; documents are packed, so no token is padding."""
    heldout_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the documents that training and calibration never see."""

    def outside(self) -> dict[str, str]:
        """Fingerprint of the text that these settings name."""
        return {"data": self.source.fingerprint()}


def documents(config: DataConfig, split: Split) -> Sequence[str]:
    """Documents of ``split`` in the order of the source, each text once.

    Texts that differ in white space only count as the same text. Those of a large source stay on
    disk until they are read.

    Raises:
        DataError: if the source cannot be read or the split is empty.
    """
    key = f"{config.model_dump_json()} {config.source.fingerprint()}"
    if key not in _SPLITS:
        _remember(_SPLITS, key, _split(config))
    chosen = _SPLITS[key][split]
    if not chosen:
        raise DataError(
            f"data source {config.source.kind} has no document in the {split} split",
            hint="give more text, or change data.heldout_share",
        )
    return chosen[:]


def token_blocks(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    split: Split,
    count: int,
    offset: int = 0,
    seed: int = 0,
) -> "NDArray[np.int64]":
    """Token ids ``[count, block_tokens]``: shuffled documents packed end to end.

    One end-of-text token follows every document. ``offset`` skips that many blocks of the same
    shuffled stream, so two calls share no block if their ranges do not meet.

    Raises:
        DataError: if the split holds fewer than ``offset + count`` blocks.
        ValueError: if ``count`` or ``offset`` is negative.
    """
    if count < 0 or offset < 0:
        raise ValueError(f"count {count} and offset {offset} must not be negative")
    texts = documents(config, split)
    settings = f"{config.model_dump_json()} {config.source.fingerprint()}"
    key = f"{settings} {split} {seed} {tokenizer_digest(tokenizer)}"
    if key not in _STREAMS:
        _remember(_STREAMS, key, _Stream(shuffled(texts, seed)))
    size = config.block_tokens
    tokens = _STREAMS[key].first((offset + count) * size, tokenizer)
    available = len(tokens) // size
    if available < offset + count:
        wanted = f"{count} blocks" + (f" after the first {offset}" if offset else "")
        raise DataError(
            f"the {split} split of data source {config.source.kind} holds {available} blocks of "
            f"{size} tokens, not {wanted}",
            hint=f"ask for fewer blocks, lower data.block_tokens, give more text"
            f"{' or raise data.heldout_share' if split == 'heldout' else ''}",
        )
    chosen = tokens[offset * size : (offset + count) * size]
    return np.array(chosen, dtype=np.int64).reshape(count, size)


def shuffled(texts: Sequence[str], seed: int) -> Sequence[str]:
    """The texts in an order that depends on themselves and ``seed`` alone."""
    digests = [_digest(text, seed) for text in texts]
    return pick(texts, sorted(range(len(digests)), key=digests.__getitem__))


def fingerprint(blocks: "NDArray[np.int64]") -> str:
    """sha256 of token ids and their shape, for manifests."""
    canonical = np.ascontiguousarray(blocks, dtype="<i8")
    return hashlib.sha256(f"{canonical.shape}".encode() + canonical.tobytes()).hexdigest()


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """sha256 of what decides the token ids of a text: the whole fast tokenizer, and the end."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{tokenizer.eos_token_id} {content}".encode()).hexdigest()


class _Stream:
    """Tokens of documents in order, tokenized as far as anyone has asked."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        self._done = 0
        self._tokens = np.zeros(0, dtype=np.int64)

    def first(self, wanted: int, tokenizer: "PreTrainedTokenizerBase") -> "NDArray[np.int64]":
        """At least the first ``wanted`` tokens, or all there are; do not write into them."""
        end = tokenizer.eos_token_id
        if end is None:
            raise DataError(
                "the tokenizer has no end-of-text token to separate documents with",
                hint="set eos_token in its tokenizer_config.json",
            )
        pieces, length = [self._tokens], len(self._tokens)
        while length < wanted and self._done < len(self._texts):
            batch = list(self._texts[self._done : self._done + _BATCH])
            ids = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
            flat = np.fromiter((t for doc in ids for t in (*doc, end)), dtype=np.int64)
            pieces.append(flat)
            length += len(flat)
            self._done += len(batch)
        self._tokens = np.concatenate(pieces)
        return self._tokens


_SPLITS: "OrderedDict[str, dict[Split, Sequence[str]]]" = OrderedDict()
_STREAMS: "OrderedDict[str, _Stream]" = OrderedDict()


def _remember(cache: "OrderedDict[str, T]", key: str, value: T) -> None:
    cache[key] = value
    while len(cache) > _KEPT:
        cache.popitem(last=False)


def _split(config: DataConfig) -> dict[Split, Sequence[str]]:
    texts = config.source.documents()
    places: dict[Split, list[int]] = {"train": [], "heldout": []}
    seen: set[bytes] = set()
    for place, text in enumerate(texts):
        digest = _digest(text)
        if text and digest not in seen:
            seen.add(digest)
            held_out = int.from_bytes(digest[:8], "big") < config.heldout_share * 2**64
            places["heldout" if held_out else "train"].append(place)
    return {split: pick(texts, chosen) for split, chosen in places.items()}


def _digest(text: str, seed: int | None = None) -> bytes:
    """sha256 of the text with white space made plain; a ``seed`` makes it an order."""
    plain = " ".join(text.split())
    salted = plain if seed is None else f"{seed}\n{plain}"
    return hashlib.sha256(salted.encode("utf-8", "surrogatepass")).digest()
