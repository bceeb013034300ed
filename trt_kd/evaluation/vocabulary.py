"""Do two models speak in the same tokens? Token-wise comparison makes no sense otherwise."""

import hashlib
import json
from filecmp import cmp
from pathlib import Path
from typing import Any

from trt_kd.checkpoints import read_json
from trt_kd.errors import ModelError

_COPY = "copy tokenizer.json from the model's source"
_RUN_TIME = ("padding", "truncation", "version")


def tokenizer_identity(directory: Path) -> str:
    """sha256 of what ``tokenizer.json`` means, however it was written.

    Padding, truncation, the spelling of merges and a post-processor that adds nothing are left
    out: programs that copy a tokenizer through their own version of the library rewrite them.

    Raises:
        ModelError: if there is no ``tokenizer.json`` or it is damaged.
    """
    content = _content(directory / "tokenizer.json")
    if merges := content["model"].get("merges"):
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        content["model"]["merges"] = pairs
    content["model"] = _without_empty(content["model"])
    meaning = {key: value for key, value in content.items() if key not in _RUN_TIME}
    if (meaning.get("post_processor") or {}).get("special_tokens") == {}:
        del meaning["post_processor"]  # it adds nothing; transformers 5 writes it, 4 does not
    canonical = json.dumps(_without_empty(meaning), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def check_same_tokenizer(model: Path, teacher: Path) -> None:
    """Compare the tokenizers of two directories.

    Raises:
        ModelError: if they differ or one is missing.
    """
    ours, theirs = model / "tokenizer.json", teacher / "tokenizer.json"
    if ours.is_file() and theirs.is_file() and cmp(ours, theirs, shallow=False):
        return
    if tokenizer_identity(model) != tokenizer_identity(teacher):
        raise ModelError(
            f"{model} and its teacher {teacher} have different tokenizers",
            hint="compare models of one tokenizer: token probabilities of two do not correspond",
        )


def real_tokens(directory: Path) -> int:
    """Tokens that the tokenizer in ``directory`` can give: one more than its highest id.

    A model's vocabulary may be larger; its last rows are padding that no text reaches.

    Raises:
        ModelError: if there is no ``tokenizer.json`` or it is damaged.
    """
    path = directory / "tokenizer.json"
    content = _content(path)
    try:
        vocabulary = content["model"]["vocab"]
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else vocabulary
        ids = range(len(pairs)) if pairs is vocabulary else [number for _, number in pairs]
        added = [token["id"] for token in content.get("added_tokens") or ()]
        return int(max((*ids, *added))) + 1
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is not a tokenizer: {error!r}", hint=_COPY) from error


def check_padding(*, student: int, teacher: int, tokenizer: Path) -> None:
    """Check that two vocabularies of different size differ in padding only.

    Args:
        student: tokens of the student's output head.
        teacher: tokens of the teacher's output head.
        tokenizer: folder of the tokenizer that both share.

    Raises:
        ModelError: if one of them lacks a token of the tokenizer.
    """
    if student != teacher and (real := real_tokens(tokenizer)) > min(student, teacher):
        raise ModelError(
            f"the student has {student:,} tokens and the teacher {teacher:,}; "
            f"the tokenizer uses {real:,}",
            hint="token distillation needs one vocabulary: prune the student from this teacher",
        )


def context_tokens(directory: Path, *, default: int = 2048) -> int:
    """Longest context that ``config.json`` in ``directory`` allows."""
    return int(read_json(directory / "config.json").get("max_position_embeddings") or default)


def _content(path: Path) -> dict[str, Any]:
    """What ``tokenizer.json`` says."""
    if not path.is_file():
        raise ModelError(
            f"{path} cannot be read: it is not there", hint="a fast tokenizer is needed"
        )
    content = read_json(path)
    if not isinstance(content.get("model"), dict):
        raise ModelError(f"{path} is not a tokenizer: it has no model", hint=_COPY)
    return content


def _without_empty(settings: dict[str, Any]) -> dict[str, Any]:
    """``settings`` without the defaults that one version writes and another leaves out."""
    return {key: value for key, value in settings.items() if value not in (None, False, "")}
