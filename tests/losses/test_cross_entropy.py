"""The task term: cross-entropy with and without label smoothing."""

import math

import pytest
import torch
from torch.nn import functional as F

from trt_kd.losses.maths import cross_entropy, cross_entropy_gradient

TOKENS, VOCABULARY = 7, 11
MASK = torch.tensor([True, True, False, True, True, False, True])
SMOOTHINGS = [0.0, 0.1, 0.7, 1.0]


def rows(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    student = 2 * torch.randn(TOKENS, VOCABULARY, generator=generator, dtype=torch.float64)
    labels = torch.arange(TOKENS)
    labels[~MASK] = -100
    return student.to(dtype).requires_grad_(), labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_cross_entropy_is_that_of_torch_over_valid_tokens(smoothing, dtype):
    student, labels = rows(dtype)
    expected = F.cross_entropy(student, labels, reduction="sum", label_smoothing=smoothing)
    value = cross_entropy(student, labels, MASK, smoothing)
    torch.testing.assert_close(value, expected)
    value.backward()
    other, gradient = cross_entropy_gradient(student, labels, MASK, smoothing)
    torch.testing.assert_close(other, value.detach())
    torch.testing.assert_close(gradient, student.grad)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_it_is_cross_entropy_with_the_smoothed_one_hot(smoothing):
    student, labels = rows()
    one_hot = F.one_hot(labels[MASK], VOCABULARY).double()
    target = (1 - smoothing) * one_hot + smoothing / VOCABULARY
    expected = -(target * student[MASK].log_softmax(-1)).sum()
    value, gradient = cross_entropy_gradient(student, labels, MASK, smoothing)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient[MASK], (student[MASK].softmax(-1) - target).detach())


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_the_gradient_is_that_of_finite_differences(smoothing):
    student, labels = rows()
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, labels, MASK, smoothing), (student,))


def test_without_smoothing_nothing_changes():
    student, labels = rows(torch.float32)
    plain = cross_entropy_gradient(student, labels, MASK)
    smoothed = cross_entropy_gradient(student, labels, MASK, 0.0)
    assert all(torch.equal(*pair) for pair in zip(plain, smoothed, strict=True))


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_masked_tokens_never_matter_and_nothing_valid_is_zero(smoothing):
    student, labels = rows()
    poisoned = student.detach().clone()
    poisoned[~MASK] = math.nan
    torch.testing.assert_close(
        cross_entropy_gradient(poisoned, labels, MASK, smoothing),
        cross_entropy_gradient(student, labels, MASK, smoothing),
    )
    value, gradient = cross_entropy_gradient(student, labels, torch.zeros_like(MASK), smoothing)
    assert value.item() == 0.0
    assert gradient.abs().sum() == 0.0


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_a_token_counts_as_often_as_its_weight_says(smoothing):
    student, labels = rows()
    weights = torch.linspace(0.0, 3.0, TOKENS, dtype=torch.float64)
    weights[~MASK] = math.nan
    each = F.cross_entropy(student, labels, reduction="none", label_smoothing=smoothing)
    expected = (weights * each)[MASK].sum()
    expected.backward()
    value, gradient = cross_entropy_gradient(student, labels, MASK, smoothing, weights)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, student.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_of_one_change_no_bit(dtype):
    student, labels = rows(dtype)
    plain = cross_entropy_gradient(student, labels, MASK, 0.1)
    ones = cross_entropy_gradient(student, labels, MASK, 0.1, torch.ones(TOKENS))
    assert all(torch.equal(*pair) for pair in zip(plain, ones, strict=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_sum_is_float32_and_the_gradient_as_the_logits(smoothing):
    student, labels = rows(torch.bfloat16)
    value, gradient = cross_entropy_gradient(student, labels, MASK, smoothing)
    assert value.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, math.nan])
@pytest.mark.parametrize("function", [cross_entropy, cross_entropy_gradient])
def test_a_share_outside_of_0_to_1_is_refused(function, smoothing):
    with pytest.raises(ValueError, match="outside of 0 to 1"):
        function(*rows(), MASK, smoothing)
