"""Cut a tokenizer down to some of its tokens, and check that it still says the same.

A text whose tokens are all kept falls into the same tokens as before. For BPE: what was merged on
the way to a kept token lies inside it and stays with it (``CutRules.parts``), so at every step the
merge that ranked first is still there and still ranks first. For Unigram: the best path is still
there, and no path has become better, because the score of an unknown character hangs on the worst
piece, which always stays. Any other text can still be written, in more tokens: bytes stay, or every
single character where there are no bytes.

Sources: Sennrich et al. 2016 (arXiv:1508.07909) for BPE; Kudo 2018 (arXiv:1804.10959) for Unigram;
the format is that of ``tokenizer.json`` of https://github.com/huggingface/tokenizers.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_kd.checkpoints import TOKENIZER_FILES, load_tokenizer, read_json
from trt_kd.errors import ModelError, VerificationError
from trt_kd.measuring.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# They repeat the vocabulary in forms that tokenizer.json makes superfluous.
_REPEATS = ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")
_WITH_IDS = ("tokenizer.json", "tokenizer_config.json")
_BYTES = tuple(f"<0x{value:02X}>" for value in range(256))
# Stands for a space; decoders know it as this token only, not as its three bytes.
_SPACE = "\u2581"


@dataclass(frozen=True)
class CutRules:
    """What a cut of a vocabulary has to respect."""

    tokens: frozenset[int]
    """Ids that name a token; a model may have more rows."""
    always: frozenset[int]
    """Ids that stay: special and added tokens, and what makes every text encodable."""
    parts: Mapping[int, tuple[int, int]]
    """The two tokens that a token is merged from; a token that stays needs both."""


def cut_rules(source: Path) -> CutRules:
    """Read the rules of the tokenizer in ``source`` and of the ids that its configs name.

    Raises:
        ModelError: if there is no fast tokenizer, or none of a type that can be cut.
    """
    content = _read_tokenizer(source)
    model, vocabulary = content["model"], _vocabulary(content["model"])
    tokenizer = load_tokenizer(source)
    always = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    # transformers 5 does not count every added token of the file as added.
    always |= {token["id"] for token in content.get("added_tokens") or []}
    always |= _encodable(content, vocabulary) | _named(source)
    _post_processor(content.get("post_processor"), _noting(always))
    parts = {}
    if model["type"] == "BPE":
        parts = merge_parts(vocabulary, [_pair(entry) for entry in model["merges"]])
    return CutRules(frozenset(tokenizer.get_vocab().values()), frozenset(always), parts)


def merge_parts(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]
) -> dict[int, tuple[int, int]]:
    """By id of a token: ids of the two tokens that BPE merges last to make it.

    Where several merges make the same token, as in tokenizers converted from SentencePiece or
    tiktoken, it is the one that BPE takes for the token's own text. A token that BPE cannot reach
    has no parts.
    """
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    ways: dict[str, list[tuple[str, str]]] = {}
    for pair in ranks:
        ways.setdefault("".join(pair), []).append(pair)
    result = {}
    for token, pairs in ways.items():
        last = pairs[0] if len(pairs) == 1 else _last_merge(token, ranks)
        if last is not None:
            result[vocabulary[token]] = (vocabulary[last[0]], vocabulary[last[1]])
    return result


def rewrite_tokenizer(source: Path, out: Path, kept: Sequence[int]) -> dict[int, int]:
    """Write to ``out`` the tokenizer of ``source`` with the tokens ``kept`` only.

    New ids are 0, 1, ... in the order of the old ones. ``out`` may be ``source``. Files that would
    repeat the old vocabulary are removed from ``out``.

    Args:
        source: directory with a fast tokenizer.
        out: existing directory.
        kept: old ids, ascending, that satisfy ``cut_rules(source)``.

    Returns:
        New ids by old ids.

    Raises:
        ModelError: if ``source`` is unfit, or a token is gone that a file names.
        ValueError: if ``kept`` does not ascend.
    """
    if any(first >= second for first, second in pairwise(kept)):
        raise ValueError("kept ids must ascend, each once")
    mapping = {int(old): new for new, old in enumerate(kept)}
    written = {"tokenizer.json": _cut_tokenizer(_read_tokenizer(source), mapping)}
    if (source / "tokenizer_config.json").is_file():
        settings = read_json(source / "tokenizer_config.json")
        written["tokenizer_config.json"] = _cut_settings(settings, mapping)
    for name in _REPEATS:
        (out / name).unlink(missing_ok=True)
    for name in set(TOKENIZER_FILES).difference(_REPEATS, _WITH_IDS):
        if (source / name).is_file() and source.resolve() != out.resolve():
            shutil.copyfile(source / name, out / name)
    for name, value in written.items():
        text = json.dumps(value, indent=2, ensure_ascii=False)
        (out / name).write_text(text + "\n", encoding="utf-8")
    return mapping


def remap_config(config: Mapping[str, Any], mapping: Mapping[int, int]) -> dict[str, Any]:
    """Contents of a ``config.json`` or ``generation_config.json`` with new token ids.

    ``vocab_size``, where it stands, becomes the number of kept ids. Lists of tokens never to be
    generated lose what is gone.

    Raises:
        ModelError: if a special token is gone.
    """
    result = dict(config)
    for key, value in config.items():
        if key.endswith("_token_id"):
            result[key] = _renumbered(value, mapping, key)
        elif key in ("suppress_tokens", "begin_suppress_tokens") and value:
            result[key] = [mapping[token] for token in value if token in mapping]
        elif key == "bad_words_ids" and value:
            whole = [word for word in value if all(token in mapping for token in word)]
            result[key] = [[mapping[token] for token in word] for word in whole]
        elif key == "vocab_size":
            result[key] = len(mapping)
    return result


def verify_tokenizer(source: Path, out: Path, kept: Sequence[int], texts: Iterable[str]) -> None:
    """Compare the tokenizer in ``out``, cut to ``kept``, with the one in ``source``.

    A text whose tokens are all kept must fall into the same tokens; every text must come back as
    with the old tokenizer. Random Unicode and the special tokens are tried beside ``texts``.
    Both directories need their ``config.json``: transformers may choose the class by it.

    Raises:
        VerificationError: naming the first text, token or setting that differs.
    """
    old, new = load_tokenizer(source), load_tokenizer(out)
    mapping = {int(token): index for index, token in enumerate(kept)}
    _verify_settings(old, new, mapping)
    probes = [" ".join(old.all_special_tokens), *_probes()]
    for text in progress([*texts, *probes], "verifying the tokenizer"):
        before = old(text, verbose=False)["input_ids"]
        after = new(text, verbose=False)["input_ids"]
        if all(token in mapping for token in before):
            expected = [mapping[token] for token in before]
            if after != expected:
                raise _difference("the tokens of", text, expected, after)
        if (was := old.decode(before)) != (is_now := new.decode(after)):
            raise _difference("the way back of", text, was, is_now)


def _verify_settings(
    old: "PreTrainedTokenizerBase", new: "PreTrainedTokenizerBase", mapping: Mapping[int, int]
) -> None:
    found = new.get_vocab()
    expected = {
        token: mapping[index] for token, index in old.get_vocab().items() if index in mapping
    }
    for token in sorted(expected.keys() | found.keys()):
        if expected.get(token) != found.get(token):
            raise _difference("the id of token", token, expected.get(token), found.get(token))
    if old.chat_template != new.chat_template:
        raise _difference("the", "chat template", old.chat_template, new.chat_template)
    if old.special_tokens_map != new.special_tokens_map:
        names = old.special_tokens_map, new.special_tokens_map
        raise _difference("the", "special tokens", *names)


def _difference(what: str, text: str, expected: object, found: object) -> VerificationError:
    return VerificationError(
        f"cut tokenizer: {what} {_short(text)} should be {_short(expected)}, not {_short(found)}",
        hint="leave the vocab axis out for this model",
    )


def _short(value: object, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


def _probes(count: int = 200, seed: int = 0) -> list[str]:
    """Texts of characters from all over Unicode, among them spaces and controls."""
    draw = random.Random(seed)
    ranges = [(0, 0x80), (0x20, 0x7F), (0xA0, 0x600), (0x2000, 0x2C00), (0x3000, 0xA000)]
    ranges += [(0xE000, 0x10000), (0x1F300, 0x1FA00), (0x10000, 0x110000)]
    texts = [" ", "  \n\t ", "a  b\r\n", _SPACE, "<0x41>"]
    for _ in range(count):
        low, high = draw.choice(ranges)
        characters = [chr(draw.randrange(low, high)) for _ in range(draw.randint(1, 12))]
        texts.append(draw.choice(("", " ")).join(characters))
    return texts


def _read_tokenizer(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            f"{directory} holds no tokenizer.json",
            hint="a vocabulary can be cut with a fast tokenizer only; leave the vocab axis out",
        )
    content = read_json(path)
    model = content.get("model") or {}
    kind = model.get("type")
    if kind is None and "merges" in model:  # as the first versions of the format wrote it
        kind = model["type"] = "BPE"
    if kind not in ("BPE", "Unigram"):
        raise ModelError(
            f"{path} is a tokenizer of type {kind!r}",
            hint="a vocabulary can be cut for BPE and Unigram only; leave the vocab axis out",
        )
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ModelError(
                f"{path} marks the parts of words ({name} {model[name]!r})",
                hint="such a vocabulary cannot be cut; leave the vocab axis out",
            )
    return content


def _vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    if model["type"] == "BPE":
        return dict(model["vocab"])
    return {token: index for index, (token, _) in enumerate(model["vocab"])}


def _pair(entry: Any) -> tuple[str, str]:
    """A merge in either of its two spellings."""
    first, second = entry.split(" ") if isinstance(entry, str) else entry
    return first, second


def _last_merge(token: str, ranks: Mapping[tuple[str, str], int]) -> tuple[str, str] | None:
    symbols, never = list(token), len(ranks)
    while len(symbols) > 2:
        found = [ranks.get(pair, never) for pair in pairwise(symbols)]
        place = found.index(min(found))
        if found[place] == never:
            return None
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    pair = (symbols[0], symbols[-1])
    return pair if pair in ranks else None


def _encodable(content: Mapping[str, Any], vocabulary: Mapping[str, int]) -> set[int]:
    """Ids that keep every text encodable, and the score of an unknown piece what it is."""
    model = content["model"]
    if model.get("byte_fallback") and all(token in vocabulary for token in _BYTES):
        needed = [*_BYTES, _SPACE]
    else:  # of a byte-level vocabulary the single characters are the bytes
        needed = [*_BYTES, *(token for token in vocabulary if len(token) == 1)]
    result = {vocabulary[token] for token in needed if token in vocabulary}
    if model["type"] == "Unigram":
        scores = [score for _, score in model["vocab"]]
        result.add(scores.index(min(scores)))
    unknown = model.get("unk_id", vocabulary.get(model.get("unk_token") or ""))
    return result if unknown is None else result | {unknown}


def _named(source: Path) -> set[int]:
    """Ids that the JSON files beside the tokenizer name."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        config = read_json(source / name) if (source / name).is_file() else {}
        for key, value in config.items():
            if key.endswith("_token_id"):
                ids = value if isinstance(value, list) else [value]
                found.update(token for token in ids if token is not None and token >= 0)
    return found


def _noting(ids: set[int]) -> Callable[[int], int]:
    def note(token: int) -> int:
        ids.add(token)
        return token

    return note


def _renumbered(value: Any, mapping: Mapping[int, int], where: str) -> Any:
    """The new id of an id, ids of a list; what is no id (None, negative) stays."""
    if isinstance(value, list):
        return [_renumbered(token, mapping, where) for token in value]
    if value is None or value < 0:
        return value
    if value not in mapping:
        raise ModelError(
            f"{where} names token {value}, which is not among the {len(mapping)} kept ones",
            hint="correct it if the model has no such token, or keep what cut_rules tells",
        )
    return mapping[value]


def _cut_tokenizer(content: dict[str, Any], mapping: Mapping[int, int]) -> dict[str, Any]:
    result = dict(content)
    result["model"] = _cut_model(content["model"], mapping)
    result["added_tokens"] = [
        token | {"id": _renumbered(token["id"], mapping, "added_tokens")}
        for token in content.get("added_tokens") or []
    ]
    result["post_processor"] = _post_processor(
        content.get("post_processor"),
        lambda token: int(_renumbered(token, mapping, "post_processor")),
    )
    if padding := content.get("padding"):
        result["padding"] = padding | {"pad_id": _renumbered(padding["pad_id"], mapping, "padding")}
    return result


def _cut_model(model: dict[str, Any], mapping: Mapping[int, int]) -> dict[str, Any]:
    if model["type"] == "Unigram":
        pieces = [piece for index, piece in enumerate(model["vocab"]) if index in mapping]
        unknown = _renumbered(model.get("unk_id"), mapping, "unk_id")
        return model | {"vocab": pieces, "unk_id": unknown}
    ids = sorted((mapping[old], token) for token, old in model["vocab"].items() if old in mapping)
    vocabulary = {token: new for new, token in ids}
    merges = []
    for entry in model["merges"]:
        pair = _pair(entry)
        if {*pair, "".join(pair)} <= vocabulary.keys():
            merges.append(entry)
    return model | {"vocab": vocabulary, "merges": merges}


def _post_processor(node: Any, new_id: Callable[[int], int]) -> Any:
    """A post-processor, its parts included, with every id passed through ``new_id``."""
    if not isinstance(node, dict):
        return node
    result = dict(node)
    if "processors" in node:
        result["processors"] = [_post_processor(part, new_id) for part in node["processors"]]
    for name in ("cls", "sep"):
        if name in node:
            token, old = node[name]
            result[name] = [token, new_id(old)]
    if isinstance(node.get("special_tokens"), dict):
        result["special_tokens"] = {
            name: entry | {"ids": [new_id(token) for token in entry["ids"]]}
            for name, entry in node["special_tokens"].items()
        }
    return result


def _cut_settings(settings: dict[str, Any], mapping: Mapping[int, int]) -> dict[str, Any]:
    result = remap_config(settings, mapping)
    if decoder := settings.get("added_tokens_decoder"):
        result["added_tokens_decoder"] = {
            str(_renumbered(int(old), mapping, "added_tokens_decoder")): token
            for old, token in decoder.items()
        }
    return result
