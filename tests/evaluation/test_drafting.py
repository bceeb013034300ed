"""Draft acceptance against speculative decoding that is really run."""

from itertools import product

import numpy as np
import pytest
import torch

from trt_kd.evaluation.drafting import (
    Drafted,
    expected_steps,
    greedy,
    sampled,
    speed_up,
    tokens_if_alike,
    tokens_per_step,
)

VOCABULARY, LENGTH, PROMPT, RUNS = 4, 6, [3, 1], 1500


@pytest.fixture(scope="module")
def models(make_model):
    """Target and draft: tiny real models that half agree."""
    settings = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
    target = make_model(**settings)
    draft = make_model(**settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += 0.06 * torch.randn_like(parameter)
    return target, draft


@pytest.fixture(scope="module")
def nexts(models):
    """Give the next token's distribution of target and draft after any text."""
    known = [{}, {}]
    for length in range(LENGTH):
        texts = list(product(range(VOCABULARY), repeat=length))
        given = torch.tensor([[*PROMPT, *text] for text in texts])
        for model, table in zip(models, known, strict=True):
            with torch.no_grad():
                p = model(given).logits[:, -1].double().softmax(-1).numpy()
            table.update(zip(texts, p, strict=True))
    return lambda which, text: known[which][tuple(text)]


def drawn(rng, p):
    return int((rng.random() * p.sum() >= p.cumsum()).sum())


def speculate(nexts, rng, ahead):
    """Steps of one run: drafts are accepted or rejected as Leviathan et al. have it."""
    text, steps = [], 0
    while len(text) < LENGTH:
        steps += 1
        drafts = []
        while len(drafts) < min(ahead, LENGTH - len(text)):
            drafts.append(drawn(rng, nexts(1, text + drafts)))
        for token in drafts:
            p, q = nexts(0, text), nexts(1, text)
            if rng.random() >= p[token] / q[token]:
                text.append(drawn(rng, np.maximum(p - q, 0)))
                break
            text.append(token)
        else:
            if len(text) < LENGTH:
                text.append(drawn(rng, nexts(0, text)))
    return steps


def written(nexts, rng):
    text = []
    while len(text) < LENGTH:
        text.append(drawn(rng, nexts(0, text)))
    return text


def seen(models, texts):
    """What the measurement says of each text."""
    given = torch.tensor([PROMPT + text for text in texts])
    with torch.no_grad():
        target, draft = (m(given).logits[:, len(PROMPT) - 1 : -1] for m in models)
    return [sampled(*rows) for rows in zip(target, draft, torch.tensor(texts), strict=True)]


def error(values):
    return np.std(values, ddof=1) / len(values) ** 0.5


@pytest.mark.parametrize("ahead", [1, 4])
def test_the_expected_steps_are_those_of_a_real_run(models, nexts, ahead):
    rng = np.random.default_rng(ahead)
    real = [speculate(nexts, rng, ahead) for _ in range(RUNS)]
    texts = seen(models, [written(nexts, rng) for _ in range(RUNS)])
    ours = [expected_steps(text.accepted, ahead) for text in texts]
    assert 1.2 < LENGTH / np.mean(real) < ahead + 1
    assert np.mean(ours) == pytest.approx(np.mean(real), abs=3 * np.hypot(error(real), error(ours)))
    assert error(ours) < error(real)


def test_one_token_ahead_is_accepted_as_often_as_in_a_real_run(models, nexts):
    rng = np.random.default_rng(9)
    first = [nexts(0, []), nexts(1, [])]
    tried = [
        rng.random() < first[0][token] / first[1][token]
        for token in (drawn(rng, first[1]) for _ in range(4000))
    ]
    overlap = seen(models, [written(nexts, rng)])[0].overlap[0]
    assert np.mean(tried) == pytest.approx(overlap, abs=4 * error(tried))
    assert overlap == pytest.approx(1 - 0.5 * np.abs(first[0] - first[1]).sum(), abs=1e-6)


def test_the_chance_of_the_written_token_is_the_overlap_on_average():
    torch.manual_seed(0)
    target, draft = 2 * torch.randn(2, 1, 9).double()
    p = target.softmax(-1)[0]
    each = sampled(target.expand(9, -1), draft.expand(9, -1), torch.arange(9))
    assert (p.numpy() * each.accepted).sum() == pytest.approx(each.overlap[0])


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_models_that_agree_accept_everything(temperature):
    logits = torch.randn(5, 7)
    found = sampled(logits, logits, torch.arange(5), temperature)
    assert found.overlap == pytest.approx(np.ones(5))
    assert found.accepted == pytest.approx(np.ones(5))
    assert tokens_per_step([found], 4) == pytest.approx(5)


def test_padding_that_one_vocabulary_lacks_is_never_drafted():
    torch.manual_seed(0)
    target, draft = torch.randn(3, 8), torch.randn(3, 6)
    found = sampled(target, draft, torch.tensor([1, 6, 7]))
    p, q = target.double().softmax(-1)[:, :6], draft.double().softmax(-1)
    assert found.overlap == pytest.approx(p.minimum(q).sum(-1).numpy())
    assert found.accepted[0] == pytest.approx(min(1.0, float(q[0, 1] / p[0, 1])))
    assert found.accepted[1:].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("same", "ahead", "steps"),
    [
        ("0000", 3, 4),
        ("1111", 1, 2),
        ("1111", 4, 1),
        ("1101", 2, 2),
        ("0110", 2, 2),
        ("1011", 3, 2),
        ("10110", 1, 3),
    ],
)
def test_greedy_steps_are_counted_as_by_hand(same, ahead, steps):
    tokens = torch.arange(len(same))
    says = torch.tensor([t if s == "1" else len(same) for t, s in enumerate(same)])
    draft = torch.nn.functional.one_hot(says, len(same) + 1).float()
    assert expected_steps(greedy(draft, tokens).accepted, ahead) == steps


def test_equal_chances_give_the_closed_form_in_the_long_run():
    text = Drafted(np.full(6000, 0.7), np.full(6000, 0.7))
    for ahead in (1, 3, 8):
        assert tokens_per_step([text], ahead) == pytest.approx(
            tokens_if_alike(0.7, ahead), rel=2e-3
        )
        closed = (1 - 0.7 ** (ahead + 1)) / 0.3
        assert tokens_if_alike(0.7, ahead) == pytest.approx(closed)
    assert tokens_if_alike(1.0, 4) == 5


def test_the_speed_up_weighs_tokens_against_passes():
    assert speed_up(3.0, 4, 0.05) == pytest.approx(2.5)
    assert speed_up(1.0, 1, 1.0) == 0.5


def test_nothing_ahead_is_refused():
    with pytest.raises(ValueError, match="ahead 0"):
        expected_steps(np.ones(3), 0)
