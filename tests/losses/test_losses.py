"""Laws every registered KD loss obeys. A new loss is tested here without a new test."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from trt_kd.losses import LOSSES
from trt_kd.losses.kl import ForwardKL, ReverseKL

TOKENS, VOCABULARY = 7, 11


@pytest.fixture(params=LOSSES.names())
def loss(request):
    return LOSSES.load(request.param)()


@pytest.fixture
def batch(logits, labels_for):
    mask = torch.tensor([True, True, False, True, True, False, True])
    teacher = logits(1)
    labels = labels_for(teacher)
    labels[~mask] = -100
    return logits(0).requires_grad_(), teacher, mask, labels


def declared(what, value):
    return [name for name in LOSSES.names() if getattr(LOSSES.load(name), what) is value]


@pytest.mark.parametrize("name", LOSSES.names())
def test_the_registered_name_is_the_default_kind(name):
    assert LOSSES.load(name)().kind == name


def test_the_exceptions_to_the_laws_are_these():
    assert declared("zero_at_agreement", False) == ["mft"]
    assert declared("smooth", False) == ["total_variation", "uld"]
    assert declared("any_vocabulary", True) == ["uld"]
    assert declared("detached_weights", True) == ["adaptive_kl"]
    assert sorted(declared("needs_labels", True)) == ["dkd", "mft"]
    assert sorted(declared("f_divergence", False)) == [
        *("adaptive_kl", "alpha_beta", "dkd", "mft", "uld")
    ]
    fields = {name: LOSSES.load(name).model_fields for name in LOSSES.names()}
    assert [name for name in fields if "temperature" not in fields[name]] == [
        *("total_variation", "uld")
    ]


def test_zero_at_agreement_unless_it_says_otherwise(case, whole):
    student, _, mask, labels = whole()
    value, gradient = case.value_and_gradient(student, student.clone(), mask, labels)
    torch.testing.assert_close(value, case(student, student.clone(), mask, labels))
    if case.zero_at_agreement:
        assert value.item() == pytest.approx(0.0, abs=1e-12)
        torch.testing.assert_close(gradient, torch.zeros_like(student), atol=1e-12, rtol=0)
    else:
        assert value.item() > 0.01
        assert gradient.abs().sum() > 0.01


def test_zero_at_agreement_in_float32_within_its_rounding(loss, batch):
    student, _, mask, labels = batch
    value = loss(student, student.detach(), mask, labels)
    value.backward()
    if loss.zero_at_agreement:
        assert value.item() == pytest.approx(0.0, abs=5e-6)
        torch.testing.assert_close(student.grad, torch.zeros_like(student), atol=1e-6, rtol=0)
    else:
        assert value.item() > 0.01


def test_positive_at_disagreement(case, whole):
    for seed in range(2, 7):
        value, _ = case.value_and_gradient(*whole(seed))
        assert value.item() > 0.1, seed


def test_a_small_step_against_the_gradient_lowers_the_loss(case, whole):
    student, teacher, mask, labels = whole()
    value, gradient = case.value_and_gradient(student, teacher, mask, labels)
    lower = case(student - 1e-4 * gradient, teacher, mask, labels)
    assert lower < value


def test_a_constant_added_to_the_logits_of_a_token_does_not_matter(case, whole):
    student, teacher, mask, labels = whole()
    shift = torch.arange(TOKENS, dtype=torch.float64).unsqueeze(-1)
    torch.testing.assert_close(
        case.value_and_gradient(student + shift, teacher - shift, mask, labels),
        case.value_and_gradient(student, teacher, mask, labels),
    )


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_masked_tokens_matter_neither_in_value_nor_in_gradient(loss, batch, poison):
    student, teacher, mask, labels = batch
    poisoned = [rows.detach().clone() for rows in (student, teacher)]
    for row in poisoned:
        row[~mask] = poison
    poisoned[0].requires_grad_()
    dirty, clean = loss(*poisoned, mask, labels), loss(student, teacher, mask, labels)
    torch.testing.assert_close(dirty, clean)
    dirty.backward()
    clean.backward()
    torch.testing.assert_close(poisoned[0].grad, student.grad)
    assert poisoned[0].grad[~mask].abs().sum() == 0.0
    value, gradient = loss.value_and_gradient(*poisoned, mask, labels)
    torch.testing.assert_close(value, clean.detach())
    torch.testing.assert_close(gradient, student.grad)
    assert gradient[~mask].abs().sum() == 0.0


def test_nothing_valid_gives_zero_loss_and_zero_gradient(loss, batch):
    student, teacher, mask, labels = batch
    nothing = torch.zeros_like(mask)
    value = loss(student, teacher, nothing, labels)
    value.backward()
    assert value.item() == 0.0
    assert student.grad.abs().sum() == 0.0
    value, gradient = loss.value_and_gradient(student, teacher, nothing, labels)
    assert value.item() == 0.0
    assert gradient.shape == student.shape
    assert gradient.abs().sum() == 0.0


@pytest.mark.parametrize("sizes", [[3, 4], [1, 5, 1]])
def test_adds_up_over_chunks(loss, batch, sizes):
    pieces = list(zip(*(x.split(sizes) for x in batch), strict=True))
    torch.testing.assert_close(sum(loss(*piece) for piece in pieces), loss(*batch))
    parts = [loss.value_and_gradient(*piece) for piece in pieces]
    value, gradient = loss.value_and_gradient(*batch)
    torch.testing.assert_close(sum(part[0] for part in parts), value)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient)


def test_no_gradient_flows_into_the_teacher(loss, batch):
    student, teacher, mask, labels = batch
    teacher.requires_grad_()
    loss(student, teacher, mask, labels).backward()
    assert teacher.grad is None


def test_logits_and_labels_are_left_as_they_were(case, batch):
    tensors = [x.detach() for x in batch]
    before = [x.clone() for x in tensors]
    case.value_and_gradient(*tensors)
    case(*tensors)
    assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))


def test_value_and_gradient_keep_no_graph(case, batch):
    value, gradient = case.value_and_gradient(*batch)
    assert not value.requires_grad
    assert not gradient.requires_grad


def test_the_gradient_is_that_of_finite_differences(case, whole):
    student, *rest = whole()
    if case.detached_weights:
        function = with_weights_of(case, student, *rest)
        student.requires_grad_()
        function(student).backward()
        _, gradient = case.value_and_gradient(student, *rest)
        torch.testing.assert_close(gradient, student.grad)
    else:

        def function(x):
            return case(x, *rest)

    assert torch.autograd.gradcheck(function, (student.detach().requires_grad_(),))


def with_weights_of(loss, student, teacher, mask, labels):
    """A mixture of both KL with the weights that ``loss`` has at ``student``, token by token."""
    rows = [slice(i, i + 1) for i in range(TOKENS)]
    kinds = [kind(temperature=loss.temperature) for kind in (ForwardKL, ReverseKL)]

    def parts(x, row):
        return [kind(x[row], teacher[row], mask[row]) for kind in kinds]

    weights = []
    for row in rows:
        forward, reverse = parts(student, row)
        mixed = loss(student[row], teacher[row], mask[row], labels[row])
        weights.append(((mixed - reverse) / (forward - reverse)).item())
    assert all(0 <= weight <= 1 for weight in weights)

    def function(x):
        total = 0.0
        for row, weight in zip(rows, weights, strict=True):
            forward, reverse = parts(x, row)
            total = total + weight * forward + (1 - weight) * reverse
        return total

    return function


def test_the_sum_is_float32_and_the_gradient_as_the_logits(loss, whole):
    student, teacher, mask, labels = whole(dtype=torch.float32)
    exact = loss(student, teacher, mask, labels)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rounded = (student.to(dtype), teacher.to(dtype), mask, labels)
        value, gradient = loss.value_and_gradient(*rounded)
        for found in (loss(*rounded), value):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, exact, rtol=0.05, atol=0.0)
        assert gradient.dtype == dtype


def test_other_vocabularies_are_refused_or_taken_as_they_are(loss, batch):
    student, teacher, mask, labels = batch
    if loss.any_vocabulary:
        wider = torch.cat([teacher, torch.full((TOKENS, 3), -200.0)], -1)
        found, known = (loss(student, rows, mask, labels) for rows in (wider, teacher))
        torch.testing.assert_close(found, known)
        return
    for function in (loss, loss.value_and_gradient):
        with pytest.raises(ValueError, match="one tokenizer"):
            function(student, teacher[:, :-1], mask, labels)


def test_labels_are_asked_for_where_they_are_needed_and_ignored_elsewhere(loss, batch):
    student, teacher, mask, labels = batch
    if loss.needs_labels:
        for function in (loss, loss.value_and_gradient):
            with pytest.raises(ValueError, match="needs labels"):
                function(student, teacher, mask)
        other = torch.where(mask, (labels + 1) % VOCABULARY, labels)
        assert loss(student, teacher, mask, other) != loss(student, teacher, mask, labels)
    else:
        assert loss(student, teacher, mask) == loss(student, teacher, mask, labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_are_those_of_autograd(case, batch, dtype, logits):
    _, _, mask, labels = batch
    student, teacher = logits(0, dtype).requires_grad_(), logits(1, dtype)
    value = case(student, teacher, mask, labels)
    value.backward()
    other, gradient = case.value_and_gradient(student, teacher, mask, labels)
    torch.testing.assert_close(other, value.detach())
    torch.testing.assert_close(gradient, student.grad)


def test_sure_students_and_sure_teachers_give_finite_numbers(case, whole):
    for gap in (0.0, 60.0, 3000.0):
        student, teacher, mask, labels = whole(dtype=torch.float32)
        for rows, token in ((student, 0), (teacher, 1)):
            rows[:, token] += gap
            rows[-1, labels[-1]] += gap
        for value in case.value_and_gradient(student, teacher, mask, labels):
            assert bool(value.isfinite().all()), gap


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("forward_kl", {"temperature": 0}),
        ("jsd", {"beta": 0}),
        ("jsd", {"beta": 1}),
        ("reverse_kl", {"temprature": 2}),
        ("skewed_forward_kl", {"alpha": 0}),
        ("skewed_reverse_kl", {"alpha": 1}),
        ("total_variation", {"temperature": 2}),
        ("alpha_beta", {"beta": 0}),
        ("adaptive_kl", {"head": 1}),
        ("dkd", {"alpha": 0}),
        ("dkd", {"beta": -1}),
        ("mft", {"threshold": 1.1}),
    ],
)
def test_impossible_options_are_refused(name, options):
    with pytest.raises(ValidationError):
        LOSSES.load(name).model_validate(options)


def test_the_page_has_a_row_for_every_loss_with_its_options_and_defaults():
    page = Path(__file__).parents[2] / "docs/losses.md"
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name, _ in rows] == LOSSES.names()
    for name, row in rows:
        options = {key: json.loads(value) for key, value in re.findall(r"`(\w+): ([\d.]+)`", row)}
        assert options == LOSSES.load(name)().model_dump(exclude={"kind"})
