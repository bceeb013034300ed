"""Losses on top-k rows with tail mass, for every registered loss that can be had from them."""

import math
from itertools import pairwise

import pytest
import torch

from trt_kd.losses import LOSSES
from trt_kd.losses.mft import Minifinetuning
from trt_kd.losses.top_k import LOG_FLOOR, TopK, top_k_of

TOKENS, VOCABULARY, K = 7, 19, 5
EVERYTHING = torch.ones(TOKENS, dtype=torch.bool)
LABELS = torch.tensor([3, 0, 18, 7, 7, 11, 2])
"""True tokens, some among the teacher's kept ones and some in its tail, whatever the seed."""


TOP_K_LOSSES = [n for n in LOSSES.names() if LOSSES.load(n)().top_k_problem() is None]


@pytest.fixture(params=TOP_K_LOSSES)
def loss(request):
    return LOSSES.load(request.param)()


def logits(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(TOKENS, VOCABULARY, generator=generator, dtype=torch.float64).to(dtype)


def bucket_probabilities(logits_TV, ids_TK):
    """Dense distributions over the kept tokens and one bucket for all others, token by token."""
    rows = []
    for row, ids in zip(logits_TV.softmax(-1), ids_TK, strict=True):
        kept = [int(i) for i in ids]
        rest = sum(row[j] for j in range(len(row)) if j not in kept)
        rows.append(torch.stack([*(row[i] for i in kept), torch.as_tensor(rest)]))
    return torch.stack(rows)


def label_buckets(ids_TK):
    """Place of each true token among the kept ones, or the place of the tail."""
    rows = [[int(i) for i in ids] for ids in ids_TK]
    return torch.tensor(
        [
            row.index(label) if label in row else len(row)
            for row, label in zip(rows, LABELS.tolist(), strict=True)
        ]
    )


@pytest.mark.parametrize("seed", range(1, 4))
def test_some_labels_are_kept_and_some_are_in_the_tail(seed):
    buckets = label_buckets(top_k_of(logits(seed), K).ids)
    assert bool((buckets < K).any())
    assert bool((buckets == K).any())


@pytest.mark.parametrize("seed", range(1, 4))
def test_value_and_gradient_are_the_papers_formula_on_the_bucketed_distributions(
    loss, seed, references
):
    student, top = logits(0).requires_grad_(), top_k_of(logits(seed), K)
    value, gradient = loss.top_k_value_and_gradient(student, top, EVERYTHING, LABELS)
    q = bucket_probabilities(student, top.ids)
    p = bucket_probabilities(logits(seed), top.ids)
    expected = references[loss.kind](loss, q, p, label_buckets(top.ids))
    expected.backward()
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, student.grad)


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("name", [n for n in TOP_K_LOSSES if not LOSSES.load(n).detached_weights])
def test_the_gradient_is_that_of_finite_differences(name, drawn):
    loss = LOSSES.load(name)()
    chances = torch.tensor([0.1, 0.45, 0.9], dtype=torch.float64).expand(TOKENS, -1)
    top = top_k_of(logits(1), K, chances if drawn else None)
    student, step = logits(0), 1e-6
    _, gradient = loss.top_k_value_and_gradient(student, top, EVERYTHING, LABELS)
    for token in range(TOKENS):
        for column in range(VOCABULARY):
            values = []
            for sign in (1, -1):
                moved = student.clone()
                moved[token, column] += sign * step
                values.append(loss.top_k_value_and_gradient(moved, top, EVERYTHING, LABELS)[0])
            slope = (values[0] - values[1]) / (2 * step)
            torch.testing.assert_close(gradient[token, column], slope, rtol=1e-5, atol=1e-7)


def test_the_whole_vocabulary_gives_the_dense_loss(loss):
    student, teacher = logits(0), logits(1)
    top = top_k_of(teacher, VOCABULARY)
    assert bool((top.tail == -math.inf).all())
    found = loss.top_k_value_and_gradient(student, top, EVERYTHING, LABELS)
    torch.testing.assert_close(found, loss.value_and_gradient(student, teacher, EVERYTHING, LABELS))


def values_by_k(loss):
    student, teacher = logits(0), logits(1)
    return [
        loss.top_k_value_and_gradient(student, top_k_of(teacher, k), EVERYTHING, LABELS)[0].item()
        for k in range(1, VOCABULARY + 1)
    ]


@pytest.mark.parametrize("name", [n for n in LOSSES.names() if LOSSES.load(n).f_divergence])
def test_an_f_divergence_rises_with_k_to_the_dense_one(name):
    values = values_by_k(LOSSES.load(name)())
    assert all(lower <= upper + 1e-12 for lower, upper in pairwise(values))


def test_a_tail_of_one_token_is_a_token(loss):
    *_, but_one, dense = values_by_k(loss)
    assert but_one == pytest.approx(dense, abs=1e-12)
    assert dense == pytest.approx(loss(logits(0), logits(1), EVERYTHING, LABELS).item())


def test_zero_loss_and_no_gradient_but_a_subgradient_at_agreement(loss):
    student = logits(0)
    top = top_k_of(student, K)
    value, gradient = loss.top_k_value_and_gradient(student, top, EVERYTHING, LABELS)
    assert loss.zero_at_agreement
    assert value.item() == pytest.approx(0.0, abs=1e-12)
    if loss.smooth:
        torch.testing.assert_close(gradient, torch.zeros_like(student), atol=1e-12, rtol=0)
    else:
        assert bool((gradient.abs() <= student.softmax(-1) * (1 + 1e-12)).all())


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_masked_rows_matter_neither_in_value_nor_in_gradient(loss, poison):
    mask = torch.tensor([True, True, False, True, False, False, True])
    student, top = logits(0), top_k_of(logits(1), K)
    clean = loss.top_k_value_and_gradient(student, top, mask, LABELS)
    dirty, logp, tail = student.clone(), top.logp.clone(), top.tail.clone()
    for rows in (dirty, logp, tail):
        rows[~mask] = poison
    labels = torch.where(mask, LABELS, -100)
    found = loss.top_k_value_and_gradient(dirty, TopK(top.ids, logp, tail), mask, labels)
    torch.testing.assert_close(found, clean)
    assert found[1][~mask].abs().sum() == 0.0


def test_nothing_valid_gives_zero_loss_and_zero_gradient(loss):
    top = top_k_of(logits(1), K)
    value, gradient = loss.top_k_value_and_gradient(logits(0), top, ~EVERYTHING, LABELS)
    assert value.item() == 0.0
    assert gradient.abs().sum() == 0.0


@pytest.mark.parametrize("cuts", [[0, 7], [0, 3, 7], [0, 1, 6, 7]])
def test_adds_up_over_chunks(loss, cuts):
    student, top = logits(0), top_k_of(logits(1), K)
    pieces = [slice(*pair) for pair in pairwise(cuts)]
    parts = [
        loss.top_k_value_and_gradient(student[p], top[p], EVERYTHING[p], LABELS[p]) for p in pieces
    ]
    value, gradient = loss.top_k_value_and_gradient(student, top, EVERYTHING, LABELS)
    torch.testing.assert_close(sum(part[0] for part in parts), value)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient)


def test_a_constant_added_to_a_row_and_the_order_of_the_kept_tokens_do_not_matter(loss):
    student, top = logits(0), top_k_of(logits(1), K)
    turned = TopK(top.ids.flip(-1), top.logp.flip(-1), top.tail)
    shift = 50 * torch.arange(TOKENS, dtype=torch.float64).unsqueeze(-1)
    torch.testing.assert_close(
        loss.top_k_value_and_gradient(student + shift, turned, EVERYTHING, LABELS),
        loss.top_k_value_and_gradient(student, top, EVERYTHING, LABELS),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_sum_is_float32_and_the_gradient_as_the_logits(loss, dtype):
    student, top = logits(0, dtype), top_k_of(logits(1, torch.float32), K)
    value, gradient = loss.top_k_value_and_gradient(student, top, EVERYTHING, LABELS)
    exact, _ = loss.top_k_value_and_gradient(logits(0), top, EVERYTHING, LABELS)
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(value, exact.float(), rtol=0.05, atol=0.0)


def test_a_student_that_has_given_up_on_the_tail_gets_finite_numbers(loss):
    student, top = logits(0, torch.float32), top_k_of(logits(1, torch.float32), K)
    student.scatter_add_(-1, top.ids, torch.full((TOKENS, K), 1e4))
    value, gradient = loss.top_k_value_and_gradient(student, top, EVERYTHING, LABELS)
    assert bool(value.isfinite())
    assert bool(gradient.isfinite().all())


def test_the_students_logits_are_left_as_they_were(loss):
    student = logits(0, torch.float32)
    before = student.clone()
    loss.top_k_value_and_gradient(
        student, top_k_of(logits(1, torch.float32), K), EVERYTHING, LABELS
    )
    assert torch.equal(student, before)


def test_top_k_keeps_the_likeliest_tokens_and_the_mass_of_the_others():
    teacher = logits(1)
    top = top_k_of(teacher, K)
    expected, ids = teacher.softmax(-1).sort(-1, descending=True)
    torch.testing.assert_close(top.logp.exp(), expected[:, :K])
    torch.testing.assert_close(top.tail.exp(), expected[:, K:].sum(-1))
    assert torch.equal(top.ids, ids[:, :K])
    torch.testing.assert_close(top.logp.exp().sum(-1) + top.tail.exp(), torch.ones(TOKENS).double())


def test_a_tail_without_mass_is_not_minus_infinity():
    certain = torch.full((1, VOCABULARY), -math.inf)
    certain[0, 3] = 0.0
    assert top_k_of(certain, 2).tail.item() == LOG_FLOOR


@pytest.mark.parametrize("k", [0, VOCABULARY + 1])
def test_more_tokens_than_there_are_is_an_error(k):
    with pytest.raises(ValueError, match="size of the vocabulary"):
        top_k_of(logits(0), k)


def test_another_number_of_rows_is_refused(loss):
    with pytest.raises(ValueError, match="7 rows of the student, 6 of the teacher"):
        loss.top_k_value_and_gradient(logits(0), top_k_of(logits(1), K)[:6], EVERYTHING)


@pytest.mark.parametrize("name", LOSSES.names())
def test_a_temperature_is_refused_because_the_tail_is_unknown_at_it(name):
    if "temperature" not in LOSSES.load(name).model_fields:
        assert name == "uld" or LOSSES.load(name)().top_k_problem() is None
        return
    warm = LOSSES.load(name)(temperature=2.0)
    problem = warm.top_k_problem()
    assert problem.startswith(name)
    with pytest.raises(ValueError, match=problem):
        warm.top_k_value_and_gradient(logits(0), top_k_of(logits(1), K), EVERYTHING, LABELS)


def test_only_these_need_more_than_top_k_at_their_defaults():
    refused = [n for n in LOSSES.names() if LOSSES.load(n)().top_k_problem() is not None]
    assert refused == ["mft", "uld"]
    assert "every true token" in Minifinetuning().top_k_problem()


def test_labels_are_asked_for_where_they_are_needed(loss):
    top = top_k_of(logits(1), K)
    if loss.needs_labels:
        with pytest.raises(ValueError, match="needs labels"):
            loss.top_k_value_and_gradient(logits(0), top, EVERYTHING)
    else:
        torch.testing.assert_close(
            loss.top_k_value_and_gradient(logits(0), top, EVERYTHING),
            loss.top_k_value_and_gradient(logits(0), top, EVERYTHING, LABELS),
        )


# --- draws from the tail ------------------------------------------------------------------------

READERS = [name for name in TOP_K_LOSSES if LOSSES.load(name).reads_draws]


def everyone_drawn(logits_TV, k, draws=4096):
    """Rows whose draws are so many that their shares are the tail's own probabilities."""
    chances = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    return top_k_of(logits_TV, k, chances.expand(TOKENS, -1))


def test_forward_kl_reads_draws():
    assert "forward_kl" in READERS


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("k", [1, K, VOCABULARY - 1])
def test_with_enough_draws_loss_and_gradient_are_the_dense_ones(name, k):
    loss, student, teacher = LOSSES.load(name)(), logits(0), logits(1)
    value, gradient = loss.top_k_value_and_gradient(student, everyone_drawn(teacher, k), EVERYTHING)
    expected, dense = loss.value_and_gradient(student, teacher, EVERYTHING)
    torch.testing.assert_close(value, expected, rtol=2e-3, atol=0)
    torch.testing.assert_close(gradient, dense, rtol=0, atol=5e-4)


@pytest.mark.parametrize("name", READERS)
def test_few_draws_are_right_on_average(name):
    loss, student, teacher = LOSSES.load(name)(), logits(0), logits(1)
    shifts = (torch.arange(512, dtype=torch.float64) + 0.5) / 512
    found = []
    for shift in shifts:
        chances = ((shift + torch.arange(3)) / 3).expand(TOKENS, -1)
        found.append(
            loss.top_k_value_and_gradient(student, top_k_of(teacher, K, chances), EVERYTHING)
        )
    values, gradients = (torch.stack(each) for each in zip(*found, strict=True))
    expected, dense = loss.value_and_gradient(student, teacher, EVERYTHING)
    assert values.std() > 0.01 * expected  # one of them alone is not
    torch.testing.assert_close(values.mean(), expected, rtol=2e-3, atol=0)
    torch.testing.assert_close(gradients.mean(0), dense, rtol=0, atol=5e-4)


def test_other_losses_are_what_they_are_without_draws(loss):
    if loss.reads_draws:
        return
    student, teacher = logits(0), logits(1)
    plain = loss.top_k_value_and_gradient(student, top_k_of(teacher, K), EVERYTHING, LABELS)
    drawn = everyone_drawn(teacher, K, 4)
    found = loss.top_k_value_and_gradient(student, drawn, EVERYTHING, LABELS)
    torch.testing.assert_close(found, plain, rtol=0, atol=0)


@pytest.mark.parametrize("name", READERS)
def test_masked_rows_and_chunks_with_draws(name):
    loss, student, top = LOSSES.load(name)(), logits(0), everyone_drawn(logits(1), K, 5)
    mask = torch.tensor([True, False, True, True, False, True, True])
    spoilt = student.clone()
    spoilt[~mask] = torch.nan
    value, gradient = loss.top_k_value_and_gradient(spoilt, top, mask)
    parts = [
        loss.top_k_value_and_gradient(student[i : i + 1], top[i : i + 1], EVERYTHING[:1])
        for i in range(TOKENS)
        if mask[i]
    ]
    torch.testing.assert_close(value, sum(part for part, _ in parts))
    torch.testing.assert_close(gradient[mask], torch.cat([part for _, part in parts]))
    assert not gradient[~mask].any()


def test_nothing_is_left_to_draw_of_a_whole_vocabulary():
    with pytest.raises(ValueError, match="leaves no token to draw"):
        everyone_drawn(logits(0), VOCABULARY)


def test_a_tail_without_mass_draws_and_stays_finite():
    teacher = logits(0)
    teacher[:, 0] += 1000.0
    top = everyone_drawn(teacher, 1, 4)
    value, gradient = LOSSES.load("forward_kl")().top_k_value_and_gradient(
        logits(1), top, EVERYTHING
    )
    assert math.isfinite(value)
    assert bool(gradient.isfinite().all())
    assert not bool((top.inside.drawn == 0).any())
