"""Log-probabilities of a teacher on disk, asked for by the token ids they belong to.

A folder holds ``shard-00000.safetensors`` and so on, and ``index.json``, which is written last: it
names the shards that a reader may see.
"""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from trt_kd.config import StrictModel
from trt_kd.errors import ArtifactError
from trt_kd.teachers.coding import Kept, decode
from trt_kd.teachers.identity import Identity, check_identity
from trt_kd.teachers.shards import Contents, Shard, damaged, sample_ids

if TYPE_CHECKING:
    from trt_kd.losses.top_k import TopK

INDEX = "index.json"


class ShardEntry(StrictModel):
    """One complete shard."""

    name: str
    """File in the cache's folder."""
    samples: int
    """Token blocks in it."""
    bytes: int
    """Size of the file."""


class Index(StrictModel):
    """Contents of ``index.json``."""

    contents: Contents
    """What all shards have in common."""
    shards: list[ShardEntry]
    """The shards that are complete."""


class Cache:
    """A complete cache, for reading."""

    def __init__(self, directory: Path, index: Index, shards: list[Shard]) -> None:
        self.directory = directory
        self.index = index
        self._shards = shards
        self._places = {
            sample: (shard, place) for shard in shards for place, sample in enumerate(shard.samples)
        }

    @classmethod
    def open(cls, directory: Path, *, expect: Identity) -> "Cache":
        """Open the cache in ``directory``.

        Raises:
            ArtifactError: if there is none, or a shard is missing, truncated or damaged.
            ModelError: if it is of another teacher, tokenizer, vocabulary or precision.
        """
        index = read_index(directory)
        if index is None:
            raise ArtifactError(
                f"{directory} holds no {INDEX}",
                hint="the run that writes this cache did not finish; run it again to resume",
            )
        check_identity(index.contents.identity, expect, directory)
        shards = [Shard(directory / entry.name) for entry in index.shards]
        for shard, entry in zip(shards, index.shards, strict=True):
            shard.check_size(entry.bytes)
        return cls(directory, index, shards)

    @property
    def k(self) -> int:
        """Tokens kept per position, draws included."""
        return self.index.contents.k

    @property
    def samples(self) -> int:
        """Token blocks in the cache."""
        return len(self._places)

    @property
    def size_bytes(self) -> int:
        """Size of all its shards."""
        return sum(entry.bytes for entry in self.index.shards)

    def holds(self, blocks: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Say for every block ``[count, L]`` whether it is there."""
        return np.array([sample in self._places for sample in sample_ids(blocks)], dtype=np.bool_)

    def rows(self, tokens_BL: NDArray[np.int64]) -> "TopK":
        """The teacher's rows for every position but the last of every block, in order.

        Args:
            tokens_BL: token ids ``[B, L]`` of whole blocks.

        Returns:
            ``B * (L - 1)`` rows, ids ascending; with draws where the cache has some.

        Raises:
            ArtifactError: if a block is not there, or its bytes are damaged.
        """
        import torch

        from trt_kd.losses.top_k import Inside, TopK

        decoded = [self._decoded(sample, tokens_BL) for sample in sample_ids(tokens_BL)]
        ids, logp, tail, drawn, entropy = (
            torch.from_numpy(np.concatenate(parts)) for parts in zip(*decoded, strict=True)
        )
        inside = Inside(drawn, entropy) if self.index.contents.draws else None
        return TopK(ids, logp, tail, inside)

    def dropped(self, tokens_BL: NDArray[np.int64]) -> NDArray[np.float32]:
        """Mean probability per row, of every block, of tokens left out of the vocabulary.

        Raises:
            ArtifactError: if a block is not there.
        """
        places = [self._place(sample, tokens_BL) for sample in sample_ids(tokens_BL)]
        return np.array([shard.dropped[place] for shard, place in places], dtype=np.float32)

    @cached_property
    def drops(self) -> bool:
        """Whether any of its blocks has left out a token of the teacher."""
        return any(bool(shard.dropped.any()) for shard in self._shards)

    def _place(self, sample: bytes, tokens_BL: NDArray[np.int64]) -> tuple[Shard, int]:
        if sample not in self._places:
            missing = int((~self.holds(tokens_BL)).sum())
            raise ArtifactError(
                f"{self.directory} lacks {missing} of {len(tokens_BL)} blocks, "
                f"first {sample.hex()[:12]} of {tokens_BL.shape[1]} tokens",
                hint="text, block_tokens or seed changed since it was written: write it again",
            )
        return self._places[sample]

    def _decoded(self, sample: bytes, tokens_BL: NDArray[np.int64]) -> Kept:
        shard, place = self._place(sample, tokens_BL)
        contents = self.index.contents
        try:
            return decode(
                shard.payload(place),
                rows=tokens_BL.shape[1] - 1,
                k=contents.likeliest,
                draws=contents.draws,
                size=contents.identity.vocabulary,
            )
        except ValueError as error:
            raise damaged(shard.path, f"sample {place}: {error}") from error


def read_index(directory: Path) -> Index | None:
    """Read the index, None where there is none.

    Raises:
        ArtifactError: if it is damaged.
    """
    path = directory / INDEX
    if not path.is_file():
        return None
    try:
        return Index.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ArtifactError(
            f"{path} is damaged: {error.errors(include_url=False)[0]['msg']}",
            hint="remove this file and run again: complete shards are kept",
        ) from error
