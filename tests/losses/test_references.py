"""Every loss against formulas, torch's functions and ModelOpt's, and against its neighbours."""

import math

import pytest
import torch
from torch.nn import functional as F

from trt_kd.losses import LOSSES
from trt_kd.losses.adaptive import AdaptiveKL
from trt_kd.losses.alpha_beta import AlphaBeta
from trt_kd.losses.dkd import DecoupledKD
from trt_kd.losses.jsd import JensenShannon
from trt_kd.losses.kl import ForwardKL, ReverseKL, SymmetricKL
from trt_kd.losses.mft import Minifinetuning
from trt_kd.losses.skewed import SkewedForwardKL, SkewedReverseKL
from trt_kd.losses.total_variation import TotalVariation

TOKENS, VOCABULARY = 7, 11
EVERYTHING = torch.ones(TOKENS, dtype=torch.bool)


def test_every_loss_has_a_reference(references):
    assert sorted(references) == sorted(LOSSES.names())


def test_values_and_gradients_are_those_of_the_papers_formula(case, references, whole):
    student, teacher, mask, labels = whole()
    temperature = getattr(case, "temperature", 1.0)
    student.requires_grad_()
    q, p = (torch.softmax(rows / temperature, -1) for rows in (student, teacher))
    expected = temperature**2 * references[case.kind](case, q, p, labels)
    expected.backward()
    value, gradient = case.value_and_gradient(student, teacher, mask, labels)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, student.grad)
    torch.testing.assert_close(case(student, teacher, mask, labels), expected)


@pytest.fixture
def probabilities(logits):
    return lambda seed, temperature: torch.softmax(logits(seed, torch.float64) / temperature, -1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_forward_reverse_and_symmetric_kl_are_those_of_torch(temperature, whole, probabilities):
    q, p = probabilities(0, temperature), probabilities(1, temperature)
    pair = whole()
    forward = temperature**2 * F.kl_div(q.log(), p, reduction="sum")
    reverse = temperature**2 * F.kl_div(p.log(), q, reduction="sum")
    torch.testing.assert_close(ForwardKL(temperature=temperature)(*pair), forward)
    torch.testing.assert_close(ReverseKL(temperature=temperature)(*pair), reverse)
    mean = (forward + reverse) / 2
    torch.testing.assert_close(SymmetricKL(temperature=temperature)(*pair), mean)


def test_kl_of_two_coins_is_the_closed_form():
    def coin(p):
        return torch.tensor([[math.log(p), math.log(1 - p)]], dtype=torch.float64)

    mask = torch.tensor([True])
    expected = 0.9 * math.log(0.9 / 0.2) + 0.1 * math.log(0.1 / 0.8)
    assert ForwardKL()(coin(0.2), coin(0.9), mask).item() == pytest.approx(expected)
    assert ReverseKL()(coin(0.9), coin(0.2), mask).item() == pytest.approx(expected)
    assert TotalVariation()(coin(0.9), coin(0.2), mask).item() == pytest.approx(0.7)


def entropy(share):
    return -(share * math.log(share) + (1 - share) * math.log(1 - share))


@pytest.mark.parametrize(
    ("loss", "bound"),
    [
        (TotalVariation(), 1.0),
        (JensenShannon(beta=0.3), entropy(0.3)),
        (SkewedForwardKL(alpha=0.3), -math.log(0.3)),
        (SkewedReverseKL(alpha=0.3), -math.log(0.3)),
    ],
)
def test_bounded_losses_reach_their_bound_where_nothing_is_shared(loss, bound, whole):
    student, teacher = torch.zeros(2, 1, VOCABULARY, dtype=torch.float64)
    student[:, 0] = teacher[:, 1] = 200.0
    assert loss(student, teacher, EVERYTHING[:1]).item() == pytest.approx(bound)
    assert loss(*whole()).item() < TOKENS * bound


@pytest.mark.parametrize(
    ("loss", "scale", "limit"),
    [
        (JensenShannon(beta=1e-6), 1e-6, ForwardKL()),
        (JensenShannon(beta=1 - 1e-6), 1e-6, ReverseKL()),
        (SkewedForwardKL(alpha=1e-6), 1.0, ForwardKL()),
        (SkewedReverseKL(alpha=1e-6), 1.0, ReverseKL()),
        (AlphaBeta(alpha=1.0, beta=1e-6), 1.0, ForwardKL()),
        (AlphaBeta(alpha=1e-6, beta=1.0), 1.0, ReverseKL()),
    ],
)
def test_families_end_at_either_kl(loss, scale, limit, whole):
    found = [part / scale for part in loss.value_and_gradient(*whole())]
    for part, expected in zip(found, limit.value_and_gradient(*whole()), strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-3, atol=1e-3)


def test_half_jensen_shannon_is_half_the_sum_of_both_half_skewed_kl(whole):
    sides = [SkewedForwardKL(alpha=0.5), SkewedReverseKL(alpha=0.5)]
    mean = sum(side(*whole()) for side in sides) / 2
    torch.testing.assert_close(JensenShannon(beta=0.5)(*whole()), mean)


def test_exponents_of_one_are_half_the_squared_distance(whole, probabilities):
    distance = 0.5 * (probabilities(0, 1.0) - probabilities(1, 1.0)).square().sum()
    torch.testing.assert_close(AlphaBeta(alpha=1.0, beta=1.0)(*whole()), distance)


@pytest.mark.parametrize("token", range(TOKENS))
def test_decoupled_kd_is_forward_kl_at_the_weights_that_it_decouples(token, whole):
    row = [x[token : token + 1] for x in whole()]
    share = 1 - row[1].softmax(-1)[0, row[3]].item()
    found = DecoupledKD(alpha=1.0, beta=share).value_and_gradient(*row)
    torch.testing.assert_close(found, ForwardKL().value_and_gradient(*row))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.9])
@pytest.mark.filterwarnings(r"ignore:`torch\.jit:DeprecationWarning")
def test_minifinetuning_is_that_of_modelopt(temperature, threshold, whole):
    from modelopt.torch.distill.losses import MFTLoss

    student, teacher, mask, labels = whole()
    theirs = MFTLoss(temperature=temperature, threshold=threshold, reduction="sum")
    student.requires_grad_()
    expected = theirs(student, teacher, labels)
    expected.backward()
    loss = Minifinetuning(temperature=temperature, threshold=threshold)
    found = loss.value_and_gradient(student, teacher, mask, labels)
    close = {"rtol": 1e-5, "atol": 1e-6}  # they add 1e-7 to each divisor
    torch.testing.assert_close(found[0], expected.detach(), **close)
    torch.testing.assert_close(found[1], student.grad, **close)


@pytest.mark.parametrize("threshold", [0.0, 0.2, 1.0])
def test_minifinetuning_ends_at_a_teacher_whose_label_leads_by_the_threshold(threshold, whole):
    from trt_kd.losses.labelled import corrected

    _, teacher, mask, labels = whole()
    p, rows = teacher.softmax(-1), torch.arange(TOKENS)
    target = corrected(p.clone(), labels[:, None], threshold)
    torch.testing.assert_close(target.sum(-1), torch.ones(TOKENS).double())
    others = target.scatter(-1, labels[:, None], 0.0).amax(-1)
    right = p.argmax(-1) == labels
    lead = target[rows, labels] - torch.where(right, p[rows, labels], others)
    wanted = torch.where(right, (1 - p[rows, labels]).clamp_max(threshold), threshold)
    torch.testing.assert_close(lead, wanted)
    value, gradient = Minifinetuning(threshold=threshold).value_and_gradient(
        target.clamp_min(1e-30).log(), teacher, mask, labels
    )
    assert value.item() == pytest.approx(0.0, abs=1e-9)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-9, rtol=0)


def test_total_variation_is_the_chance_that_a_drafted_token_is_rejected(whole, probabilities):
    q, p = probabilities(0, 1.0), probabilities(1, 1.0)
    accepted = (q * (p / q).clamp_max(1.0)).sum()
    torch.testing.assert_close(TotalVariation()(*whole()), TOKENS - accepted)


def test_heads_of_any_size_are_those_of_a_whole_sort(references):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 1000, generator=generator, dtype=torch.float64)
    teacher *= torch.tensor([[4.0], [1.0], [0.1]])
    loss, mask = AdaptiveKL(head=0.8), EVERYTHING[:3]
    sizes = [
        int((row.sort(descending=True)[0].cumsum(0) <= 0.8).sum()) for row in teacher.softmax(-1)
    ]
    assert sizes[0] < 64 < sizes[1] < 512 < sizes[2]
    expected = references["adaptive_kl"](loss, student.softmax(-1), teacher.softmax(-1), None)
    torch.testing.assert_close(loss.value_and_gradient(student, teacher, mask)[0], expected)
