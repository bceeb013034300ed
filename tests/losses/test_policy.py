"""MiniLLM's gradient against the reverse KL itself: every text of a tiny language, in float64.

A language of three tokens and a table of logits for every beginning is a model whose texts can all
be written down. Expectations are sums over them, and the gradient of the reverse KL between whole
texts is autograd's.
"""

from itertools import product

import pytest
import torch

from trt_kd.losses.policy import JudgedRows, importance, outlooks, policy_gradient
from trt_kd.training.judging import judged
from trt_kd.training.on_policy import PolicyGradient

VOCABULARY = 3
PLAIN = {"single_step": False, "teacher_mix": 0.0, "length_normalised": False}


def language(length, seed):
    """Logits after every beginning shorter than ``length``."""
    generator = torch.Generator().manual_seed(seed)
    return {
        begin: torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
        for size in range(length)
        for begin in product(range(VOCABULARY), repeat=size)
    }


@pytest.fixture(params=[1, 2, 3])
def length(request):
    return request.param


def pair(length):
    student = {begin: x.requires_grad_() for begin, x in language(length, 0).items()}
    return student, language(length, 1)


def probability(table, text):
    """Probability of a whole text, as a tensor."""
    steps = [table[text[:n]].softmax(-1)[token] for n, token in enumerate(text)]
    return torch.stack(steps).prod()


def reverse_kl(student, teacher, length):
    texts = product(range(VOCABULARY), repeat=length)
    pairs = [(probability(student, text), probability(teacher, text)) for text in texts]
    return sum(q * (q / p).log() for q, p in pairs)


def exact_gradient(student, teacher, length):
    value = reverse_kl(student, teacher, length)
    return dict(zip(student, torch.autograd.grad(value, [*student.values()]), strict=True))


def rows(table, text):
    return torch.stack([table[text[:n]].detach() for n in range(len(text))])


def expected(policy, student, teacher, length):
    """Value and gradient that ``policy`` gives on average over what it samples."""
    total = {begin: torch.zeros_like(x) for begin, x in student.items()}
    value = 0.0
    mix = policy.teacher_mix
    for text in product(range(VOCABULARY), repeat=length):
        student_TV, teacher_TV = rows(student, text), rows(teacher, text)
        labels = torch.tensor(text)
        mask = torch.ones(1, length, dtype=torch.bool)
        at, _ = judged(policy, student_TV.__getitem__, teacher_TV.__getitem__, labels, mask)
        found, gradient_TV = policy_gradient(student_TV.clone(), at(slice(0, length)), labels)
        sampled = mix * teacher_TV.softmax(-1) + (1 - mix) * student_TV.softmax(-1)
        chance = sampled.gather(-1, labels[:, None]).prod()
        value += chance * found
        for n in range(length):
            total[text[:n]] += chance * gradient_TV[n]
    return value, total


def same(found, wanted):
    for begin, gradient in wanted.items():
        torch.testing.assert_close(found[begin], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("single_step", [False, True])
def test_the_gradient_is_on_average_that_of_the_reverse_kl_of_whole_texts(length, single_step):
    student, teacher = pair(length)
    policy = PolicyGradient(**PLAIN | {"single_step": single_step})
    value, found = expected(policy, student, teacher, length)
    same(found, exact_gradient(student, teacher, length))
    assert value.item() == pytest.approx(reverse_kl(student, teacher, length).item(), rel=1e-12)


def test_the_single_step_takes_a_token_s_own_part_without_chance():
    """On texts of one token nothing is left to chance; without it the sample decides."""
    student, teacher = pair(1)
    wanted = exact_gradient(student, teacher, 1)[()]
    found = {True: [], False: []}
    for single_step, gradients in found.items():
        policy = PolicyGradient(**PLAIN | {"single_step": single_step})
        for token in range(VOCABULARY):
            labels, mask = torch.tensor([token]), torch.ones(1, 1, dtype=torch.bool)
            one, other = rows(student, (token,)), rows(teacher, (token,))
            at, _ = judged(policy, one.__getitem__, other.__getitem__, labels, mask)
            gradients.append(policy_gradient(one.clone(), at(slice(0, 1)), labels)[1][0])
    for gradient in found[True]:
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)
    assert all((gradient - wanted).abs().max() > 1e-2 for gradient in found[False])


def test_with_the_teacher_mixed_in_a_token_of_a_text_of_one_counts_as_in_the_student():
    student, teacher = pair(1)
    for single_step in (False, True):
        policy = PolicyGradient(**PLAIN | {"single_step": single_step, "teacher_mix": 0.4})
        _, found = expected(policy, student, teacher, 1)
        same(found, exact_gradient(student, teacher, 1))


def test_with_the_teacher_mixed_in_only_the_past_and_what_follows_are_the_mixture_s():
    """The paper's single factor: the token is the student's, before and after it is the mixture."""
    length, mix = 3, 0.4
    student, teacher = pair(length)
    policy = PolicyGradient(**PLAIN | {"single_step": True, "teacher_mix": mix})
    _, found = expected(policy, student, teacher, length)

    def step(table, begin):
        return table[begin].softmax(-1)

    def mixed(begin):
        return mix * step(teacher, begin) + (1 - mix) * step(student, begin).detach()

    def outlook(begin):
        """What log p/q sums to after ``begin``, when the mixture goes on."""
        if len(begin) == length:
            return 0.0
        gain = (step(teacher, begin) / step(student, begin).detach()).log()
        ahead = [outlook((*begin, token)) for token in range(VOCABULARY)]
        return sum(mixed(begin)[n] * (gain[n] + ahead[n]) for n in range(VOCABULARY))

    total = 0.0
    for begin in student:
        reached = 1.0
        for n, token in enumerate(begin):
            reached = reached * mixed(begin[:n])[token]
        q = step(student, begin)
        own = (q * (q / step(teacher, begin)).log()).sum()
        after = sum(q[token] * outlook((*begin, token)) for token in range(VOCABULARY))
        total = total + reached * (own - after)
    gradients = torch.autograd.grad(total, [*student.values()])
    same(found, dict(zip(student, gradients, strict=True)))


def test_the_importance_of_what_the_mixture_samples_is_one_on_average_and_bounded():
    q, p = (
        torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).softmax(-1)
        for n in (0, 1)
    )
    for mix in (0.0, 0.2, 0.9):
        weights = importance(q.log(), p.log(), mix)
        torch.testing.assert_close(weights, q / (mix * p + (1 - mix) * q))
        assert ((mix * p + (1 - mix) * q) * weights).sum() == pytest.approx(1.0)
        assert weights.max() <= 1 / (1 - mix) + 1e-12


def test_normalised_for_length_a_token_counts_what_follows_it_on_average():
    gains = torch.tensor([[9.0, 1.0, 2.0, 6.0, 7.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
    mask = torch.tensor([[False, True, True, True, False], [True] * 5])
    sums = outlooks(gains, mask, own=False, length_normalised=False)
    assert sums.tolist() == [[9.0, 8.0, 6.0, 0.0, 0.0], [12.0, 9.0, 6.0, 3.0, 0.0]]
    means = outlooks(gains, mask, own=False, length_normalised=True)
    assert means.tolist() == [[3.0, 4.0, 6.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0, 0.0]]
    with_own = outlooks(gains, mask, own=True, length_normalised=True)
    assert with_own[0, 1:4].tolist() == [3.0, 4.0, 6.0]


def test_normalising_the_length_changes_nothing_where_one_token_follows_at_most():
    student, teacher = pair(2)
    found = [
        expected(PolicyGradient(teacher_mix=0.0, length_normalised=normal), student, teacher, 2)[1]
        for normal in (False, True)
    ]
    same(*found)


@pytest.mark.parametrize("single_step", [False, True])
def test_where_both_agree_there_is_nothing_to_learn(single_step):
    student = language(2, 0)
    policy = PolicyGradient(**PLAIN | {"single_step": single_step, "teacher_mix": 0.3})
    for text in product(range(VOCABULARY), repeat=2):
        logits, labels = rows(student, text), torch.tensor(text)
        mask = torch.ones(1, 2, dtype=torch.bool)
        at, weights = judged(policy, logits.__getitem__, logits.__getitem__, labels, mask)
        value, gradient = policy_gradient(logits.clone(), at(slice(0, 2)), labels)
        assert abs(value) < 1e-12
        assert gradient.abs().max() < 1e-12
        torch.testing.assert_close(weights, torch.ones(2, dtype=torch.float64))


def test_rows_are_sliced_and_cast_together():
    made = JudgedRows(torch.randn(4, 3), torch.arange(4.0), -torch.arange(4.0), True)
    part = made[1:3].to(torch.float64)
    assert part.weights.tolist() == [1, 2]
    assert part.outlooks.tolist() == [-1, -2]
    assert part.logits.dtype == torch.float64
    assert part.single_step
