"""Filling a cache: what is missing, shard by shard, so that a kill costs one shard at most."""

import logging
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from trt_kd.errors import ArtifactError, ModelError
from trt_kd.teachers.cache import INDEX, Cache, Index, ShardEntry, read_index
from trt_kd.teachers.coding import bytes_per_row, encode
from trt_kd.teachers.identity import check_identity
from trt_kd.teachers.shards import Contents, Samples, Shard, put, sample_ids, write_shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trt_kd.teachers.forward import Rows

    RowsOf: TypeAlias = Callable[[NDArray[np.int64]], list[Rows]]

logger = logging.getLogger(__name__)

SHARD_TOKENS = 1 << 16
"""Tokens of one shard, about: some MB, and a minute's work of a small teacher on a CPU."""


def write_cache(
    directory: Path,
    load: "Callable[[], PreTrainedModel]",
    blocks: NDArray[np.int64],
    *,
    contents: Contents,
    batch_size: int = 4,
) -> Cache:
    """Fill a cache from a model, see ``fill_cache``.

    Args:
        directory: of the cache; made if need be.
        load: gives the teacher; called only if a block is missing.
        blocks: token ids ``[count, L]``.
        contents: tokens to keep per position, and the identity of the teacher that ``load`` gives.
        batch_size: blocks of one forward pass; where the cache is resumed it should be the same.

    Raises:
        ArtifactError: if the disk lacks space, or a shard is damaged.
        ModelError: if the cache is of another teacher, k or draws, k is above the vocabulary, or
            the teacher's head is not linear or gives NaN.
    """
    return fill_cache(
        directory,
        lambda: _running(load(), contents),
        blocks,
        contents=contents,
        batch_size=batch_size,
    )


def fill_cache(
    directory: Path,
    teacher: "Callable[[], RowsOf]",
    blocks: NDArray[np.int64],
    *,
    contents: Contents,
    batch_size: int,
) -> Cache:
    """Add the blocks that the cache in ``directory`` lacks, and open it.

    A run that was cut off goes on after its last complete shard, and ends with the same bytes as
    one that was not. Of two runs at once, the second waits for the first.

    Args:
        directory: of the cache; made if need be.
        teacher: makes ready what gives the rows of blocks; called only if a block is missing.
        blocks: token ids ``[count, L]``.
        contents: tokens to keep per position, and whose they are.
        batch_size: blocks asked for at a time; where the cache is resumed it should be the same.

    Raises:
        ArtifactError: if the disk lacks space, or a shard is damaged.
        ModelError: if the cache is of another teacher, k or draws, or k is above the vocabulary.
    """
    identity = contents.identity
    if contents.k > identity.vocabulary:
        raise ModelError(
            f"k {contents.k} is more than the teacher's {identity.vocabulary} tokens",
            hint=f"set k to {identity.vocabulary} or less; 64 is plenty",
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(
            f"{directory} cannot be made: {error.strerror}", hint="choose another folder"
        ) from error
    with _alone(directory):
        shards = _complete_shards(directory, contents)
        missing = _missing(blocks, shards)
        if len(missing):
            _check_space(directory, missing.size, contents)
            shards += _write(directory, teacher(), missing, contents, batch_size)
        _write_index(directory, contents, shards)
    return Cache.open(directory, expect=identity)


def _running(model: "PreTrainedModel", contents: Contents) -> "RowsOf":
    """Rows from the forward pass of ``model``."""
    import torch

    from trt_kd.teachers.forward import check_linear_head, top_k_rows

    precision, size = contents.identity.precision, contents.identity.vocabulary
    if precision == "served":
        raise ValueError("a served teacher is not run here")
    check_linear_head(model, "teacher")
    device: Any = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    return partial(
        top_k_rows,
        model,
        k=contents.likeliest,
        draws=contents.draws,
        precision=precision,
        vocabulary=size,
    )


def estimate_bytes(tokens: int, contents: Contents) -> int:
    """Bytes that a cache of so many tokens takes at most, about: see ``bytes_per_row``."""
    size = contents.identity.vocabulary
    return math.ceil(tokens * bytes_per_row(contents.likeliest, size, contents.draws))


def _complete_shards(directory: Path, contents: Contents) -> list[Shard]:
    """Shards that stand in ``directory``, whether an index names them or not."""
    for leftover in directory.glob("*.partial"):
        leftover.unlink()
    index = read_index(directory)
    shards = [Shard(path) for path in sorted(directory.glob("shard-*.safetensors"))]
    for found in [*([index.contents] if index else []), *(shard.contents for shard in shards)]:
        check_identity(found.identity, contents.identity, directory)
        if (found.k, found.draws) != (contents.k, contents.draws):
            raise ModelError(
                f"{directory} holds {found.k} tokens of every position, {found.draws} of them "
                f"drawn, not {contents.k} and {contents.draws}",
                hint=f"set k to {found.k} and draws to {found.draws}, or choose another folder",
            )
    sizes = {entry.name: entry.bytes for entry in index.shards} if index else {}
    for shard in shards:
        shard.check_size(sizes.get(shard.path.name, shard.size_bytes))
    return shards


def _missing(blocks: NDArray[np.int64], shards: list[Shard]) -> NDArray[np.int64]:
    """Blocks that no shard holds, in order, each once."""
    known = {sample for shard in shards for sample in shard.samples}
    chosen = []
    for place, sample in enumerate(sample_ids(blocks)):
        if sample not in known:
            known.add(sample)
            chosen.append(place)
    return blocks[chosen]


def _write(
    directory: Path,
    rows_of: "RowsOf",
    blocks: NDArray[np.int64],
    contents: Contents,
    batch_size: int,
) -> list[Shard]:
    """Write ``blocks``; a shard holds whole batches, so that a resumed run makes the same ones."""
    size = contents.identity.vocabulary
    per_shard = batch_size * max(1, SHARD_TOKENS // (batch_size * blocks.shape[1]))
    names = (f"shard-{number:05d}.safetensors" for number in count())
    paths = (path for name in names if not (path := directory / name).exists())
    shards = []
    with tqdm(total=len(blocks), desc="teacher", unit="block", disable=None) as bar:
        for start in range(0, len(blocks), per_shard):
            part = blocks[start : start + per_shard]
            payloads, dropped = [], []
            for at in range(0, len(part), batch_size):
                batch = part[at : at + batch_size]
                rows = rows_of(batch)
                payloads += [encode(row.kept, size) for row in rows]
                dropped += [float(row.dropped.mean()) for row in rows]
                bar.update(len(batch))
            samples = Samples(sample_ids(part), payloads, dropped)
            shards.append(write_shard(next(paths), contents, samples))
            logger.info(
                "teacher: %d of %d blocks cached, %.0f bytes per token",
                start + len(part),
                len(blocks),
                sum(map(len, payloads)) / part.size,
            )
    return shards


def _write_index(directory: Path, contents: Contents, shards: list[Shard]) -> None:
    entries = [
        ShardEntry(name=shard.path.name, samples=len(shard.samples), bytes=shard.size_bytes)
        for shard in sorted(shards, key=lambda shard: shard.path.name)
    ]
    index = Index(contents=contents, shards=entries)
    if read_index(directory) != index:
        put(directory / INDEX, (index.model_dump_json(indent=2) + "\n").encode())


def _check_space(directory: Path, tokens: int, contents: Contents) -> None:
    needed = estimate_bytes(tokens, contents)
    free = shutil.disk_usage(directory).free
    logger.info("teacher: up to %.1f MB for %d tokens in %s", needed / 1e6, tokens, directory)
    if free < needed:
        raise ArtifactError(
            f"{contents.k} tokens of the teacher's for each of {tokens:,} take up to "
            f"{needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free in {directory}",
            hint="free disk space, lower k, or choose a folder on another disk",
        )


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Let one run at a time write."""
    import fcntl

    with (directory / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another run fills %s; waiting for it", directory)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
