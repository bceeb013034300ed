"""The losses at several options, rows for them, and each once more in plain probabilities."""

import pytest
import torch

from trt_kd.losses import LOSSES

TOKENS, VOCABULARY = 7, 11
OPTIONS = [
    ("jsd", {"beta": 0.2}),
    ("jsd", {"beta": 0.9}),
    ("skewed_forward_kl", {"alpha": 0.6}),
    ("skewed_reverse_kl", {"alpha": 0.6}),
    ("alpha_beta", {"alpha": 0.8, "beta": 0.6}),
    ("adaptive_kl", {"head": 0.9}),
    ("adaptive_kl", {"head": 0.01}),
    ("dkd", {"alpha": 0.5, "beta": 8.0}),
    ("mft", {"threshold": 0.0}),
    ("mft", {"threshold": 1.0}),
]
"""Options other than the defaults; all are tested at their defaults and warm in any case."""


def has_temperature(name):
    return "temperature" in LOSSES.load(name).model_fields


CASES = [
    *((name, {}) for name in LOSSES.names()),
    *((name, {"temperature": 2.0}) for name in LOSSES.names() if has_temperature(name)),
    *OPTIONS,
]


@pytest.fixture(params=CASES, ids=str)
def case(request):
    name, options = request.param
    return LOSSES.load(name)(**options)


def logits(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(TOKENS, VOCABULARY, generator=generator, dtype=torch.float64).to(dtype)


def labels_for(teacher):
    """True tokens: the teacher's first, second, ... choice, so that it is right about some."""
    order = teacher.argsort(-1, descending=True)
    return order[torch.arange(len(teacher)), torch.arange(len(teacher)) % 3].clone()


@pytest.fixture(name="logits")
def logits_fixture():
    """Gives logits ``[7, 11]`` of (seed, dtype)."""
    return logits


@pytest.fixture(name="labels_for")
def labels_for_fixture():
    """Gives true tokens for a teacher's logits."""
    return labels_for


@pytest.fixture
def whole():
    """Gives student, teacher, mask and labels, all rows valid."""

    def rows(seed=1, dtype=torch.float64):
        teacher = logits(seed, dtype)
        mask = torch.ones(TOKENS, dtype=torch.bool)
        return logits(0, dtype), teacher, mask, labels_for(teacher)

    return rows


# --- references: float64 probabilities, as the papers have them -----------------------------------


def kl(a, b):
    """KL of each row; a token without mass adds nothing."""
    return torch.where(a > 0, a * (a.clamp_min(1e-300) / b).log(), 0.0).sum(-1)


def forward_kl(loss, q, p, labels):
    return kl(p, q).sum()


def reverse_kl(loss, q, p, labels):
    return kl(q, p).sum()


def symmetric_kl(loss, q, p, labels):
    return ((p - q) * (p / q).log()).sum() / 2


def jsd(loss, q, p, labels):
    m = loss.beta * p + (1 - loss.beta) * q
    return (loss.beta * kl(p, m) + (1 - loss.beta) * kl(q, m)).sum()


def skewed_forward_kl(loss, q, p, labels):
    return kl(p, loss.alpha * p + (1 - loss.alpha) * q).sum()


def skewed_reverse_kl(loss, q, p, labels):
    return kl(q, (1 - loss.alpha) * p + loss.alpha * q).sum()


def total_variation(loss, q, p, labels):
    return torch.where(q > p, q - p, 0.0).sum()


def alpha_beta(loss, q, p, labels):
    a, b = loss.alpha, loss.beta
    terms = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
    return -terms.sum() / (a * b)


def adaptive_kl(loss, q, p, labels):
    total = 0.0
    for row_q, row_p in zip(q, p, strict=True):
        gap = (row_p - row_q.detach()).abs()
        order = sorted(range(len(row_p)), key=lambda token: -row_p[token].item())
        head, mass = [order[0]], row_p[order[0]].item()
        for token in order[1:]:
            mass += row_p[token].item()
            if mass > loss.head:
                break
            head.append(token)
        weight = gap[head].sum() / gap.sum()
        total = total + weight * kl(row_p, row_q) + (1 - weight) * kl(row_q, row_p)
    return total


def dkd(loss, q, p, labels):
    total = 0.0
    for row_q, row_p, label in zip(q, p, labels.tolist(), strict=True):
        others = [token for token in range(len(row_p)) if token != label]
        pair_q = torch.stack([row_q[label], row_q[others].sum()])
        pair_p = torch.stack([row_p[label], row_p[others].sum()])
        rest = kl(row_p[others] / pair_p[1], row_q[others] / pair_q[1])
        total = total + loss.alpha * kl(pair_p, pair_q) + loss.beta * rest
    return total


def mft(loss, q, p, labels):
    total = 0.0
    for row_q, row_p, label in zip(q, p, labels.tolist(), strict=True):
        one_hot = torch.zeros_like(row_p)
        one_hot[label] = 1.0
        peak = int(row_p.argmax())
        if peak == label:
            share = (min(1.0, row_p[label] + loss.threshold) - row_p[label]) / (1 - row_p[label])
        else:
            lead = row_p[peak] - row_p[label]
            share = (lead + loss.threshold) / (1 + lead)
        total = total + kl((1 - share) * row_p + share * one_hot, row_q)
    return total


def uld(loss, q, p, labels):
    return sum(
        abs(a - b)
        for row_q, row_p in zip(q, p, strict=True)
        for a, b in zip(sorted(row_q, reverse=True), sorted(row_p, reverse=True), strict=True)
    )


REFERENCES = {
    function.__name__: function
    for function in (
        forward_kl,
        reverse_kl,
        symmetric_kl,
        jsd,
        skewed_forward_kl,
        skewed_reverse_kl,
        total_variation,
        alpha_beta,
        adaptive_kl,
        dkd,
        mft,
        uld,
    )
}


@pytest.fixture
def references():
    """By registered name: the sum of the loss at temperature 1 of (loss, q, p, labels)."""
    return REFERENCES
