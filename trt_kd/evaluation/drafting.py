"""How well a small model drafts for a large one in speculative decoding, without running it.

Speculative decoding (Leviathan et al. 2023, arXiv:2211.17192) lets the draft q propose tokens one
after another; the target p reads them all in one pass and accepts each with probability
min(1, p/q). What comes out is distributed as p. So the other way round, given a text that p wrote,
each of its tokens x at a drafted place was an accepted draft with probability min(1, q(x)/p(x)),
independently, and the run of steps over the text is a Markov chain whose expected length is known.

Shape suffixes: N tokens of a text, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Drafted:
    """One text that the target wrote, as seen by the draft; float64 ``[N]``."""

    overlap: np.ndarray
    """Chance that a token drafted here is accepted, 1 - TV(p, q)."""
    accepted: np.ndarray
    """Chance that the token which stands here was an accepted draft, if one was drafted."""


def sampled(
    target_NV: Tensor, draft_NV: Tensor, tokens_N: Tensor, temperature: float = 1.0
) -> Drafted:
    """Both chances for a text sampled from the target at ``temperature``, as the draft is.

    Args:
        target_NV: logits that predict the tokens.
        draft_NV: the same of the draft; the vocabularies may be padded differently.
        tokens_N: the text, int64.
        temperature: above 0.
    """
    log_p, log_q = (x.double().div(temperature).log_softmax(-1) for x in (target_NV, draft_NV))
    common = min(log_p.shape[1], log_q.shape[1])
    overlap_N = log_p[:, :common].minimum(log_q[:, :common]).exp().sum(-1)
    inside_N1 = tokens_N.clamp_max(common - 1).unsqueeze(-1)
    ratio_N = (log_q.gather(-1, inside_N1) - log_p.gather(-1, inside_N1))[:, 0]
    accepted_N = ratio_N.clamp_max(0.0).exp() * (tokens_N < common)
    return Drafted(overlap_N.clamp_max(1.0).cpu().numpy(), accepted_N.cpu().numpy())


def greedy(draft_NV: Tensor, tokens_N: Tensor) -> Drafted:
    """The same where both take their likeliest token: 1 where the draft's stands in the text."""
    same_N = (draft_NV.argmax(-1) == tokens_N).double().cpu().numpy()
    return Drafted(same_N, same_N)


def expected_steps(accepted_N: np.ndarray, ahead: int) -> float:
    """Expected passes of the target over a text when ``ahead`` tokens are drafted for each.

    A step takes drafts up to the first that is rejected, in whose place the target puts one of its
    own; after ``ahead`` accepted ones it adds one.

    Raises:
        ValueError: if ``ahead`` is not positive.
    """
    if ahead < 1:
        raise ValueError(f"ahead {ahead} must be at least 1")
    count = len(accepted_N)
    left = np.zeros(count + ahead + 1)  # steps from each place on; none after the end
    for place in range(count - 1, -1, -1):
        reached, total = 1.0, 1.0
        for token in range(place, min(place + ahead, count)):
            total += reached * (1 - accepted_N[token]) * left[token + 1]
            reached *= accepted_N[token]
        left[place] = total + reached * left[min(place + ahead + 1, count)]
    return float(left[0])


def tokens_per_step(texts: Sequence[Drafted], ahead: int) -> float:
    """Tokens of all texts by the expected passes of the target over them."""
    steps = sum(expected_steps(text.accepted, ahead) for text in texts)
    return sum(len(text.accepted) for text in texts) / steps


def tokens_if_alike(acceptance: float, ahead: int) -> float:
    """Tokens of a step if every draft were accepted with one probability, independently.

    Leviathan et al., equation 1: (1 - a^(g + 1)) / (1 - a).
    """
    return sum(acceptance**count for count in range(ahead + 1))


def speed_up(tokens: float, ahead: int, cost_ratio: float) -> float:
    """Against one pass of the target for each token; ``cost_ratio`` is a pass of the draft to it.

    Leviathan et al., theorem 3.8; reading several tokens counts as much as reading one.
    """
    return tokens / (1 + ahead * cost_ratio)
