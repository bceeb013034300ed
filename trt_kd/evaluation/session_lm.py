"""Any backend's session as a language model of lm-evaluation-harness.

What ships is what is measured: the adapter needs nothing but logits.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from trt_kd.backends.base import Session
from trt_kd.errors import ConfigError, VerificationError
from trt_kd.measuring.progress import progress

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]
Request = tuple[tuple[str, str], list[int], list[int]]


@dataclass(frozen=True)
class _Span:
    """One continuation inside one forward pass."""

    inputs: Ids
    """Token ids that the model reads: all but the last of context and continuation."""
    targets: Ids
    """Ids of the continuation; the last ``len(targets)`` logits of ``inputs`` predict them."""


class SessionLM(TemplateLM):  # type: ignore[misc]
    """Log-likelihoods by forward passes over right-padded batches; nothing is kept between them.

    Padding at the right cannot reach earlier positions of a causal model. For the same reason a
    request whose input starts another request's input is read off the longer one's logits, which
    saves most passes of one-token choices.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        batch_size: int,
        max_tokens: int,
    ) -> None:
        super().__init__()
        self.session = session
        self.tokenizer = tokenizer
        self._batch_size = batch_size
        self._max_tokens = max_tokens

    @property
    def eot_token_id(self) -> int:
        """Id of the end of text, which also stands before an empty context."""
        return int(self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        """Name for lm-eval's records."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; by default with the tokenizer's own special tokens, but never two starts."""
        if add_special_tokens is None:
            start = self.tokenizer.bos_token
            add_special_tokens = not (start and string.startswith(str(start)))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def loglikelihood(
        self, requests: "list[Instance]", disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of every continuation, and whether it is the greedy one."""
        return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[no-any-return]

    def loglikelihood_rolling(
        self, requests: "list[Instance]", disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood in nats of whole texts, in windows of the longest context."""
        windows: list[Request] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._max_tokens,
                context_len=1,
            ):
                windows.append((("", ""), *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """Refuse: sessions tell likelihoods, they do not write text.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "this lm-eval task generates text; evaluate scores log-likelihoods only",
            hint="choose a multiple-choice task such as hellaswag, arc_easy or piqa",
        )

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        spans = [self._span(context, continuation) for _, context, continuation in requests]
        hosts = _hosts({span.inputs for span in spans})
        waiting: dict[Ids, list[int]] = {}
        for index, span in enumerate(spans):
            waiting.setdefault(hosts[span.inputs], []).append(index)
        longest_first = sorted(waiting, key=lambda ids: (-len(ids), ids))
        results: list[tuple[float, bool]] = [(0.0, False)] * len(spans)
        starts = range(0, len(longest_first), self._batch_size)
        for start in progress(starts, "scoring choices"):
            batch = longest_first[start : start + self._batch_size]
            for ids, logits_LV in zip(batch, self.session.logits(_padded(batch)), strict=True):
                for index in waiting[ids]:
                    results[index] = _score(spans[index], logits_LV)
        return results

    def _span(self, context: list[int], continuation: list[int]) -> _Span:
        """Cut the context from the left where both together are too long."""
        if not continuation or len(continuation) > self._max_tokens:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens; 1 to {self._max_tokens} can be read"
            )
        whole = (*context, *continuation)[-(self._max_tokens + 1) :]
        return _Span(inputs=whole[:-1], targets=tuple(continuation))


def _hosts(inputs: set[Ids]) -> dict[Ids, Ids]:
    """The longest input that starts with each input; in sorted order it follows at once."""
    hosts: dict[Ids, Ids] = {}
    following: Ids = ()
    for ids in sorted(inputs, reverse=True):
        starts_next = following[: len(ids)] == ids
        hosts[ids] = hosts[following] if starts_next and following else ids
        following = ids
    return hosts


def _padded(batch: list[Ids]) -> np.ndarray:
    """Token ids ``[B, L]``; short rows repeat their last token, which no earlier position sees."""
    width = max(map(len, batch))
    return np.array([ids + (ids[-1],) * (width - len(ids)) for ids in batch], dtype=np.int64)


def _score(span: _Span, logits_LV: np.ndarray) -> tuple[float, bool]:
    end = len(span.inputs)
    rows_TV = logits_LV[end - len(span.targets) : end]
    if not np.isfinite(rows_TV).all():
        raise VerificationError(
            "the model gives logits that are not finite",
            hint="its weights are damaged or its number format overflows: export it again",
        )
    targets = np.array(span.targets)
    shifted = rows_TV - rows_TV.max(-1, keepdims=True)
    log_total_T = np.log(np.exp(shifted).sum(-1, dtype=np.float64))
    chosen_T = shifted[np.arange(len(targets)), targets]
    greedy = bool((rows_TV.argmax(-1) == targets).all())
    return float((chosen_T - log_total_T).sum()), greedy
