"""Size of the vocabulary: tokens that a corpus never uses go, with their rows.

The tokenizer is rewritten to match, see ``tokenizer.py``. V ids of the old vocabulary, K kept.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from trt_kd.errors import DataError, ModelError
from trt_kd.measuring.progress import progress
from trt_kd.pruning.base import Place, Unit, WidthAxis
from trt_kd.pruning.tokenizer import CutRules, remap_config

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from trt_kd.architectures.base import Architecture

_BATCH = 256


def used_tokens(
    texts: Iterable[str], tokenizer: "PreTrainedTokenizerBase", *, rows: int | None = None
) -> NDArray[np.int64]:
    """How often each token occurs in ``texts``, special tokens left out: ``[V]``.

    V is one more than the largest id, or ``rows`` of the embedding where those are more.

    Raises:
        DataError: if there is no text.
        ModelError: if the tokenizer has ids that the embedding has no rows for.
    """
    size = max(tokenizer.get_vocab().values()) + 1
    if rows is not None and rows < size:
        raise ModelError(
            f"the tokenizer has ids up to {size - 1:,}, the model only {rows:,} embedding rows",
            hint="model and tokenizer do not belong together",
        )
    counts_V = np.zeros(rows or size, dtype=np.int64)
    for batch in progress(list(_batches(texts)), "counting tokens"):
        ids = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        flat = np.fromiter((token for document in ids for token in document), dtype=np.int64)
        counts_V += np.bincount(flat, minlength=len(counts_V))
    if not counts_V.any():
        raise DataError(
            "there is no text to count tokens in",
            hint="the vocab axis needs the corpus that the model will work on",
        )
    return counts_V


def retention_order(counts_V: NDArray[np.int64], rules: CutRules) -> NDArray[np.int64]:
    """All V ids, the one to be dropped last first: every beginning that holds the minimum is legal.

    First the minimum, ``rules.always`` and its parts; then tokens by falling count, earlier ids
    first, each right behind those of its parts that are not there yet; then ids without a token.

    Raises:
        ModelError: if a token that must stay is not among the V.
    """
    beyond = max(rules.always | rules.tokens)
    if beyond >= len(counts_V):
        raise ModelError(
            f"token {beyond:,} must stay, but the vocabulary has only {len(counts_V):,}",
            hint="a special token id in config.json or the tokenizer is wrong: correct it",
        )
    seen: set[int] = set()
    order = _closed(sorted(rules.always), rules.parts, seen)
    by_count = np.argsort(-counts_V, kind="stable").tolist()
    order += _closed((token for token in by_count if token in rules.tokens), rules.parts, seen)
    order += [token for token in range(len(counts_V)) if token not in seen]
    return np.array(order, dtype=np.int64)


def kept_tokens(
    counts_V: NDArray[np.int64], rules: CutRules, size: int, *, multiple_of: int = 64
) -> NDArray[np.int64]:
    """The ``size`` ids to keep, ascending, with everything that must stay and its parts.

    ``multiple_of`` is the grid that sizes come from.

    Raises:
        ModelError: if more than ``size`` tokens must stay, or there are not so many.
    """
    order = retention_order(counts_V, rules)
    least = len(_closed(sorted(rules.always), rules.parts, set()))
    if size < least:
        raise ModelError(
            f"a vocabulary of {size:,} cannot hold the {least:,} tokens that must stay",
            hint="special tokens, bytes and what they are merged from: ask for at least "
            f"{min(-(-least // multiple_of) * multiple_of, len(order)):,}",
        )
    if size > len(order):
        raise ModelError(
            f"a vocabulary of {size:,} is larger than the model's {len(order):,}",
            hint=f"pruning only shrinks: ask for at most {len(order):,}",
        )
    return np.sort(order[:size])


class VocabAxis(WidthAxis):
    """Keep the tokens that a corpus uses; ids change, so the tokenizer has to be rewritten.

    They are ranked by ``retention_order``, not by activations.
    """

    kind: Literal["vocab"] = "vocab"
    constraint: ClassVar[str] = "vocab_size"
    shape_field: ClassVar[str] = "vocab"
    unit: ClassVar[Unit] = "tokens"

    def places(self, model: "PreTrainedModel", architecture: "Architecture") -> list[Place]:
        """One: rows of the embedding and the head."""
        from trt_kd.architectures.base import Slice, rows

        embedding, head = architecture.embedding(model), architecture.head(model)
        count = embedding.num_embeddings
        return [Place((), (Slice(embedding, "weight", 0, count), *rows(head, count)))]

    def after_cut(
        self,
        model: "PreTrainedModel",
        architecture: "Architecture",
        keep: "Sequence[Tensor]",
    ) -> None:
        """See the base class; special token ids of the configs follow their tokens."""
        from trt_kd.architectures.base import update

        (keep_K,) = keep
        mapping = {old: new for new, old in enumerate(keep_K.tolist())}
        _remap(model.config, mapping)
        _remap(model.generation_config, mapping)
        for module in (model, model.base_model):
            update(module, "vocab_size", len(mapping))
            update(module, "padding_idx", architecture.embedding(model).padding_idx)
        architecture.record(model, vocab=len(mapping))


def _remap(config: Any, mapping: Mapping[int, int]) -> None:
    if config is None:
        return
    before = config.to_dict()
    for key, value in remap_config(before, mapping).items():
        if value != before[key]:
            setattr(config, key, value)


def _closed(
    tokens: Iterable[int], parts: Mapping[int, tuple[int, int]], seen: set[int]
) -> list[int]:
    """``tokens`` not in ``seen``, each behind its parts; ``seen`` takes them all in."""
    result: list[int] = []
    for token in tokens:
        stack = [token]
        while stack:
            missing = [part for part in parts.get(stack[-1], ()) if part not in seen]
            if missing:
                stack += missing
                continue
            done = stack.pop()
            if done not in seen:
                seen.add(done)
                result.append(done)
    return result


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(texts)
    while batch := list(islice(iterator, _BATCH)):
        yield batch
