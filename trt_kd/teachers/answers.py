"""From a server's answer about one block to the rows of a cache, every token id verified.

vLLM's ``prompt_logprobs`` names tokens by id and gives their text; the ``echo`` of OpenAI's
completions names them by text, or as ``token_id:N``.

Shape suffixes: L positions, K kept tokens.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from math import exp, isfinite, log1p
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trt_kd.losses.top_k import LOG_FLOOR
from trt_kd.teachers.coding import Kept
from trt_kd.teachers.forward import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNREADABLE = "\N{REPLACEMENT CHARACTER}"
"""Stands in texts for bytes that are no character by themselves."""
SLACK = 1e-3
"""Kept probabilities may sum to so much above 1: servers compute in bfloat16."""


class Texts:
    """What the tokens of a tokenizer read as."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", size: int) -> None:
        self._tokenizer: Any = tokenizer
        self._size = size

    def agree(self, token: int, told: str) -> bool:
        """Say whether ``told`` may be the text of ``token``; a part of a character may be any."""
        spelled = self._spelled(token)
        if any(UNREADABLE in text for text in (told, spelled[0])):
            return True
        return told in spelled or told.lstrip(" ") == spelled[0].lstrip(" ")

    def id_of(self, name: str) -> int | None:
        """The one token that ``name`` (a text, or ``token_id:N``) means, None if it is not one."""
        number = name.removeprefix("token_id:")
        if number != name:
            return int(number) if number.isdigit() else None
        found = self._ids.get(name, ())
        return found[0] if len(found) == 1 else None

    def shown(self, token: int) -> str:
        """The token with its text, for errors."""
        return f"{token} {self._spelled(token)[0]!r}"

    def _spelled(self, token: int) -> tuple[str, str]:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        return self._tokenizer.decode([token]), str(piece)

    @cached_property
    def _ids(self) -> Mapping[str, list[int]]:
        found: dict[str, list[int]] = {}
        for token in range(min(self._size, len(self._tokenizer))):
            for text in set(self._spelled(token)):
                found.setdefault(text, []).append(token)
        return found


Candidates = list[tuple[int, float]]


def rows_of(
    choice: Mapping[str, Any],
    tokens_L: NDArray[np.int64],
    *,
    k: int,
    texts: Texts,
    size: int,
) -> Rows:
    """The ``k`` likeliest tokens after every position but the last.

    Args:
        choice: the answer's first choice, of either form.
        tokens_L: ids that were asked about.
        k: tokens to keep.
        texts: of the student's tokenizer.
        size: tokens of the student's vocabulary.

    Raises:
        ValueError: saying what in the answer is missing or does not agree.
    """
    read: Callable[..., Candidates]
    if choice.get("prompt_logprobs") is not None:
        entries, read = choice["prompt_logprobs"], _by_id
    else:
        logprobs = choice.get("logprobs") or {}
        entries, read = logprobs.get("top_logprobs"), _by_text
        _check_echo(logprobs.get("tokens"), tokens_L, texts)
    if not isinstance(entries, list) or len(entries) < len(tokens_L):
        raise ValueError("it returns no log-probabilities of the prompt's tokens")
    kept = []
    for position in range(1, len(tokens_L)):
        try:
            found = read(entries[position], int(tokens_L[position]), texts)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"position {position} is of no known form: {error!r}") from error
        kept.append(_checked(found, position, k=k, size=size))
    ids = np.array([[token for token, _ in row] for row in kept], dtype=np.int64)
    logp = np.array([[value for _, value in row] for row in kept], dtype=np.float32)
    tails = [_log_tail([value for _, value in row]) for row in kept]
    nothing = np.zeros(len(kept), dtype=np.float32)
    return Rows(Kept.without_draws(ids, logp, np.array(tails, dtype=np.float32)), nothing)


def _by_id(entry: Mapping[str, Any], token: int, texts: Texts) -> Candidates:
    told = entry.get(str(token))
    if told is None:
        raise ValueError(f"it does not say how likely the prompt's token {token} is")
    text = told["decoded_token"]
    if not isinstance(text, str):
        raise ValueError("it names no text beside token ids, so that they cannot be verified")
    if not texts.agree(token, text):
        raise ValueError(f"token {texts.shown(token)} reads {text!r} there: another tokenizer")
    return [(int(name), float(value["logprob"])) for name, value in entry.items()]


def _by_text(entry: Mapping[str, float], token: int, texts: Texts) -> Candidates:
    found = {name: texts.id_of(name) for name in entry}
    unknown = [name for name, number in found.items() if number is None]
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is not the text of one token: ask with form prompt_logprobs, or for "
            "token ids (vLLM's --return-tokens-as-token-ids)"
        )
    return [(number, float(entry[name])) for name, number in found.items() if number is not None]


def _check_echo(tokens: Any, tokens_L: NDArray[np.int64], texts: Texts) -> None:
    """Compare the echo with what was asked about."""
    if not isinstance(tokens, list) or len(tokens) < len(tokens_L):
        raise ValueError("it returns no log-probabilities of the prompt's tokens")
    for position, (told, token) in enumerate(zip(tokens, tokens_L.tolist(), strict=False)):
        named = texts.id_of(told) if str(told).startswith("token_id:") else None
        if named != token if named is not None else not texts.agree(token, str(told)):
            raise ValueError(
                f"token {texts.shown(token)} at position {position} is {told!r} there: "
                "another tokenizer"
            )


def _checked(found: Candidates, position: int, *, k: int, size: int) -> Candidates:
    best = sorted(found, key=lambda pair: -pair[1])[:k]
    if len({token for token, _ in best}) < k:
        raise ValueError(f"it returns {len(best)} of {k} log-probabilities at position {position}")
    for token, value in best:
        if not 0 <= token < size:
            raise ValueError(f"token {token} is outside of the student's {size:,}")
        if not isfinite(value) or value > SLACK:
            raise ValueError(f"{value} at position {position} is no log-probability")
    if (total := sum(exp(value) for _, value in best)) > 1 + SLACK:
        raise ValueError(f"probabilities at position {position} sum to {total:.3f}")
    return best


def _log_tail(values: list[float]) -> float:
    """Log-mass of all that is not kept."""
    rest = 1 - sum(map(exp, values))
    return max(log1p(rest - 1), LOG_FLOOR) if rest > 0 else LOG_FLOOR
