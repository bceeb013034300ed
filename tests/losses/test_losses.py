"""Laws every registered KD loss obeys. A new loss is tested here without a new test."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from trt_kd.losses import LOSSES
from trt_kd.losses.jsd import JensenShannon
from trt_kd.losses.kl import ForwardKL, ReverseKL
from trt_kd.losses.maths import cross_entropy, cross_entropy_gradient

TOKENS, VOCABULARY = 7, 11


@pytest.fixture(params=LOSSES.names())
def loss(request):
    return LOSSES.load(request.param)()


@pytest.fixture(params=LOSSES.names())
def warm_loss(request):
    return LOSSES.load(request.param)(temperature=2.0)


def logits(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(TOKENS, VOCABULARY, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture
def batch():
    mask = torch.tensor([True, True, False, True, True, False, True])
    return logits(0).requires_grad_(), logits(1), mask


@pytest.mark.parametrize("name", LOSSES.names())
def test_the_registered_name_is_the_default_kind(name):
    assert LOSSES.load(name)().kind == name


def test_zero_at_agreement(loss, batch):
    student, _, mask = batch
    assert loss(student, student.detach(), mask).item() == pytest.approx(0.0, abs=1e-6)


def test_no_gradient_at_agreement(loss, batch):
    student, _, mask = batch
    loss(student, student.detach(), mask).backward()
    torch.testing.assert_close(student.grad, torch.zeros_like(student), atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(2, 7))
def test_positive_at_disagreement(loss, seed):
    mask = torch.ones(TOKENS, dtype=torch.bool)
    assert loss(logits(0), logits(seed), mask).item() > 0.1


def test_a_constant_added_to_the_logits_of_a_token_does_not_matter(loss, batch):
    student, teacher, mask = batch
    shift = torch.arange(TOKENS, dtype=torch.float32).unsqueeze(-1)
    torch.testing.assert_close(
        loss(student + shift, teacher - shift, mask), loss(student, teacher, mask)
    )


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_masked_tokens_matter_neither_in_value_nor_in_gradient(loss, batch, poison):
    student, teacher, mask = batch
    poisoned = [logits.detach().clone() for logits in (student, teacher)]
    for row in poisoned:
        row[~mask] = poison
    poisoned[0].requires_grad_()
    dirty, clean = loss(*poisoned, mask), loss(student, teacher, mask)
    torch.testing.assert_close(dirty, clean)
    dirty.backward()
    clean.backward()
    torch.testing.assert_close(poisoned[0].grad, student.grad)
    assert poisoned[0].grad[~mask].abs().sum() == 0.0


def test_nothing_valid_gives_zero_loss_and_zero_gradient(loss, batch):
    student, teacher, mask = batch
    value = loss(student, teacher, torch.zeros_like(mask))
    value.backward()
    assert value.item() == 0.0
    assert student.grad.abs().sum() == 0.0


@pytest.mark.parametrize("sizes", [[7], [3, 4], [1, 5, 1]])
def test_adds_up_over_chunks(loss, batch, sizes):
    pieces = zip(*(x.split(sizes) for x in batch), strict=True)
    torch.testing.assert_close(sum(loss(*piece) for piece in pieces), loss(*batch))


def test_no_gradient_flows_into_the_teacher(loss, batch):
    student, teacher, mask = batch
    teacher.requires_grad_()
    loss(student, teacher, mask).backward()
    assert teacher.grad is None


def test_the_gradient_is_that_of_finite_differences(warm_loss, batch):
    _, _, mask = batch
    student = logits(0, torch.float64).requires_grad_()
    teacher = logits(1, torch.float64)
    assert torch.autograd.gradcheck(lambda x: warm_loss(x, teacher, mask), (student,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_sum_is_float32_whatever_the_logits_are(loss, batch, dtype):
    student, teacher, mask = batch
    value = loss(student.to(dtype), teacher.to(dtype), mask)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(student, teacher, mask), rtol=0.05, atol=0.0)


def test_other_vocabularies_are_refused(loss, batch):
    student, teacher, mask = batch
    with pytest.raises(ValueError, match="one tokenizer"):
        loss(student, teacher[:, :-1], mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_are_those_of_autograd(warm_loss, batch, dtype):
    _, _, mask = batch
    student, teacher = logits(0, dtype).requires_grad_(), logits(1, dtype)
    value = warm_loss(student, teacher, mask)
    value.backward()
    other, gradient = warm_loss.value_and_gradient(student, teacher, mask)
    torch.testing.assert_close(other, value.detach())
    torch.testing.assert_close(gradient, student.grad)


def probabilities(seed, temperature):
    return torch.softmax(logits(seed, torch.float64) / temperature, -1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_forward_and_reverse_kl_are_those_of_torch(temperature):
    mask = torch.ones(TOKENS, dtype=torch.bool)
    q, p = probabilities(0, temperature), probabilities(1, temperature)
    pair = logits(0, torch.float64), logits(1, torch.float64), mask
    forward = temperature**2 * F.kl_div(q.log(), p, reduction="sum")
    reverse = temperature**2 * F.kl_div(p.log(), q, reduction="sum")
    torch.testing.assert_close(ForwardKL(temperature=temperature)(*pair), forward)
    torch.testing.assert_close(ReverseKL(temperature=temperature)(*pair), reverse)


def test_kl_of_two_coins_is_the_closed_form():
    def coin(p):
        return torch.tensor([[math.log(p), math.log(1 - p)]], dtype=torch.float64)

    mask = torch.tensor([True])
    expected = 0.9 * math.log(0.9 / 0.2) + 0.1 * math.log(0.1 / 0.8)
    assert ForwardKL()(coin(0.2), coin(0.9), mask).item() == pytest.approx(expected)
    assert ReverseKL()(coin(0.9), coin(0.2), mask).item() == pytest.approx(expected)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_generalised_jensen_shannon_is_its_definition(beta):
    q, p = probabilities(0, 1.0), probabilities(1, 1.0)
    m = beta * p + (1 - beta) * q
    expected = beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()
    mask = torch.ones(TOKENS, dtype=torch.bool)
    value = JensenShannon(beta=beta)(logits(0, torch.float64), logits(1, torch.float64), mask)
    torch.testing.assert_close(value, expected)
    entropy = -(beta * math.log(beta) + (1 - beta) * math.log(1 - beta))
    assert value.item() <= TOKENS * entropy


@pytest.mark.parametrize(("beta", "limit"), [(1e-6, ForwardKL()), (1 - 1e-6, ReverseKL())])
def test_jensen_shannon_tends_to_either_kl(beta, limit):
    mask = torch.ones(TOKENS, dtype=torch.bool)
    pair = logits(0, torch.float64), logits(1, torch.float64), mask
    expected = limit(*pair).item()
    assert JensenShannon(beta=beta)(*pair).item() / 1e-6 == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("forward_kl", {"temperature": 0}),
        ("jsd", {"beta": 0}),
        ("jsd", {"beta": 1}),
        ("reverse_kl", {"temprature": 2}),
    ],
)
def test_impossible_options_are_refused(name, options):
    with pytest.raises(ValidationError):
        LOSSES.load(name).model_validate(options)


def test_cross_entropy_is_that_of_torch_over_valid_tokens(batch):
    student, _, mask = batch
    labels = torch.arange(TOKENS)
    labels[~mask] = -100
    value = cross_entropy(student, labels, mask)
    torch.testing.assert_close(value, F.cross_entropy(student, labels, reduction="sum"))
    value.backward()
    other, gradient = cross_entropy_gradient(student.detach(), labels, mask)
    torch.testing.assert_close(other, value.detach())
    torch.testing.assert_close(gradient, student.grad)
