"""Whose log-probabilities a cache holds."""

import hashlib
from pathlib import Path
from typing import Literal

from trt_kd.architectures.shape import read_shape
from trt_kd.artifacts import Artifact
from trt_kd.artifacts.manifest import MANIFEST, sha256_of
from trt_kd.checkpoints import check_weights
from trt_kd.config import StrictModel
from trt_kd.errors import ModelError
from trt_kd.teachers.base import Precision


class Identity(StrictModel):
    """What decides the log-probabilities of given token ids."""

    teacher: str
    """sha256 over the digests of ``config.json`` and the weight files."""
    tokenizer: str
    """sha256 of ``tokenizer.json``."""
    vocabulary: int
    """Tokens of the output head."""
    precision: Precision | Literal["served"]
    """Of the forward pass's matrix products."""


def digest_of_checkpoint(directory: Path) -> str:
    """sha256 over the digests of ``config.json`` and the weights; an artifact's are known.

    Raises:
        ModelError: if a file is missing or damaged.
    """
    check_weights(directory)
    names = ["config.json", *sorted(path.name for path in directory.glob("*.safetensors"))]
    known = Artifact.open(directory).manifest.files if (directory / MANIFEST).is_file() else {}
    digests = [f"{name} {known.get(name) or sha256_of(directory / name)}" for name in names]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def identity_of(directory: Path, *, precision: Precision) -> Identity:
    """Identity of the checkpoint in ``directory``; files of an artifact are not digested again.

    Raises:
        ModelError: if a file is missing or damaged.
    """
    tokenizer = directory / "tokenizer.json"
    if not tokenizer.is_file():
        raise ModelError(f"{tokenizer} is missing", hint="import the model again from its source")
    return Identity(
        teacher=digest_of_checkpoint(directory),
        tokenizer=sha256_of(tokenizer),
        vocabulary=read_shape(directory).vocab,
        precision=precision,
    )


def check_identity(found: Identity, expected: Identity, directory: Path) -> None:
    """Check that the cache in ``directory`` is of the teacher that is asked for.

    Raises:
        ModelError: naming the first of teacher, tokenizer, vocabulary and precision that differs.
    """
    for name in ("tokenizer", "vocabulary", "teacher", "precision"):
        was, wanted = (str(getattr(one, name))[:12] for one in (found, expected))
        if getattr(found, name) != getattr(expected, name):
            raise ModelError(
                f"{directory} holds log-probabilities of another {name}: {was}, not {wanted}",
                hint="give this teacher a cache of its own, or remove that folder",
            )
