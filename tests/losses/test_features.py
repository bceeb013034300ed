"""Laws every registered feature loss obeys. A new one is tested here without a new test."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from trt_kd.losses import FEATURE_LOSSES

SEQUENCES, POSITIONS, WIDTH, OTHER, REMEMBERED = 3, 9, 24, 48, 11
OPTIONS = [
    ("logsum", {"alpha": 5.0}),
    ("logsum", {"alpha": 2.0, "floor": 1.0}),
    ("attention_transfer", {"power": 4.0}),
    ("attention_transfer", {"power": 1.0}),
    ("nst", {"degree": 1}),
    ("rkd_distance", {"tokens": 4}),
    ("rkd_angle", {"tokens": 4}),
    ("minilm", {"heads": 2, "causal": False}),
    ("minilm", {"heads": 1, "relations": ["values"]}),
    ("minilm_v1", {"heads": 2}),
    ("crd", {"temperature": 0.5}),
]
"""Options other than the defaults; all are tested at their defaults in any case."""
CASES = [*((name, {}) for name in FEATURE_LOSSES.names()), *OPTIONS]


@pytest.fixture(params=CASES, ids=str)
def loss(request):
    name, options = request.param
    return FEATURE_LOSSES.load(name).model_validate(options)


def random(seed, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def features(loss, seed=0, dtype=torch.float64, *, widths=(WIDTH, None)):
    """Student, teacher, mask, memory; the teacher wider where the loss allows it."""
    teacher_width = widths[1] or (WIDTH if loss.same_width else OTHER)
    mask = torch.ones(SEQUENCES, POSITIONS, dtype=torch.bool)
    mask[0, 3], mask[1, 6:] = False, False
    memory = random(seed + 9, REMEMBERED, teacher_width, dtype=dtype) if loss.memory_rows else None
    return (
        random(seed, SEQUENCES, POSITIONS, widths[0], dtype=dtype),
        random(seed + 1, SEQUENCES, POSITIONS, teacher_width, dtype=dtype),
        mask,
        memory,
    )


def test_the_exceptions_to_the_laws_are_these():
    loaded = {name: FEATURE_LOSSES.load(name)() for name in FEATURE_LOSSES.names()}
    assert [name for name, loss in loaded.items() if not loss.zero_at_agreement] == ["crd"]
    assert [name for name, loss in loaded.items() if loss.memory_rows] == ["crd"]
    assert [name for name, loss in loaded.items() if loss.reads != ("states",)] == [
        "minilm", "minilm_v1",
    ]  # fmt: skip
    assert [name for name, loss in loaded.items() if loss.attention_heads] == ["minilm_v1"]
    assert [name for name, loss in loaded.items() if loss.same_width] == [
        "mse", "cosine", "logsum", "hint", "crd", "pkd",
    ]  # fmt: skip


def test_zero_with_no_gradient_at_agreement_unless_it_says_otherwise(loss):
    student, _, mask, memory = features(loss, widths=(WIDTH, WIDTH))
    student.requires_grad_()
    value = loss(student, student.detach().clone(), mask, memory)
    value.backward()
    if loss.zero_at_agreement:
        assert value.item() == pytest.approx(0.0, abs=1e-9)
        torch.testing.assert_close(student.grad, torch.zeros_like(student), atol=1e-9, rtol=0)
    else:
        assert value.item() > 0.01


@pytest.mark.parametrize("seed", range(3))
def test_positive_at_disagreement_and_lower_a_small_step_against_the_gradient(loss, seed):
    student, teacher, mask, memory = features(loss, seed)
    student.requires_grad_()
    value = loss(student, teacher, mask, memory)
    value.backward()
    assert value.item() > 1e-3
    with torch.no_grad():
        assert loss(student - 1e-4 * student.grad, teacher, mask, memory) < value


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_masked_tokens_matter_neither_in_value_nor_in_gradient(loss, poison):
    student, teacher, mask, memory = features(loss)
    poisoned = [x.clone() for x in (student, teacher)]
    for x in poisoned:
        x[~mask] = poison
    student.requires_grad_()
    poisoned[0].requires_grad_()
    dirty, clean = loss(*poisoned, mask, memory), loss(student, teacher, mask, memory)
    torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
    dirty.backward()
    clean.backward()
    torch.testing.assert_close(poisoned[0].grad, student.grad, rtol=0, atol=0)
    assert student.grad[~mask].abs().sum() == 0.0


def test_nothing_valid_gives_zero_loss_and_zero_gradient(loss):
    student, teacher, mask, memory = features(loss)
    student.requires_grad_()
    value = loss(student, teacher, torch.zeros_like(mask), memory)
    value.backward()
    assert value.item() == 0.0
    assert student.grad.abs().sum() == 0.0


def test_a_sequence_of_one_or_two_tokens_gives_a_finite_loss_and_gradient(loss):
    student, teacher, mask, memory = features(loss)
    mask[0], mask[1] = False, False
    mask[0, 0] = mask[1, 0] = mask[1, 5] = True
    student.requires_grad_()
    value = loss(student, teacher, mask, memory)
    value.backward()
    assert bool(value.isfinite())
    assert bool(student.grad.isfinite().all())


def test_equal_tokens_and_zero_features_give_finite_numbers(loss):
    student, teacher, mask, memory = features(loss)
    student[0], teacher[0] = student[0, :1], teacher[0, :1]
    student[1], teacher[2] = 0.0, 0.0
    student.requires_grad_()
    value = loss(student, teacher, mask, memory)
    value.backward()
    assert bool(value.isfinite())
    assert bool(student.grad.isfinite().all())


def test_adds_up_over_sequences(loss):
    student, teacher, mask, memory = features(loss)
    whole = loss(student, teacher, mask, memory)
    parts = [
        loss(student[rows], teacher[rows], mask[rows], memory)
        for rows in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_the_order_of_the_sequences_does_not_matter(loss):
    student, teacher, mask, memory = features(loss)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(
        loss(student[order], teacher[order], mask[order], memory),
        loss(student, teacher, mask, memory),
    )


@pytest.mark.parametrize("case", [case for case in CASES if case[0] != "crd"], ids=str)
def test_the_gradient_is_that_of_finite_differences(case):
    """Not of crd: its gradient holds a scale constant, as its reference does."""
    loss = FEATURE_LOSSES.load(case[0]).model_validate(case[1])
    student, teacher, mask, _ = features(loss)
    student, teacher, mask = student[:2, :6], teacher[:2, :6], mask[:2, :6]
    assert torch.autograd.gradcheck(
        lambda x: loss(x, teacher, mask), (student.clone().requires_grad_(),)
    )


def test_a_projector_of_the_teachers_side_gets_its_gradient(loss):
    student, teacher, mask, memory = features(loss)
    teacher.requires_grad_()
    loss(student, teacher, mask, memory).backward()
    assert teacher.grad[mask].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_sum_is_float32_from_whatever_dtype(loss, dtype):
    student, teacher, mask, memory = features(loss, dtype=torch.float32)
    rounded = [x if x is None else x.to(dtype) for x in (student, teacher)]
    found = loss(*rounded, mask, memory)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(student, teacher, mask, memory), rtol=0.05, atol=0.0)


def test_features_are_left_as_they_were(loss):
    tensors = [x for x in features(loss) if x is not None]
    before = [x.clone() for x in tensors]
    loss(*tensors)
    assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))


def test_features_of_other_tokens_or_widths_are_refused(loss):
    student, teacher, mask, memory = features(loss)
    with pytest.raises(ValueError, match="not of the same tokens"):
        loss(student, teacher[:, :-1], mask, memory)
    if loss.same_width:
        with pytest.raises(ValueError, match="channel by channel"):
            loss(student[..., :-1], teacher, mask, memory)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("logsum", {"alpha": 1.0}),
        ("logsum", {"floor": 0.0}),
        ("attention_transfer", {"power": 0.5}),
        ("nst", {"degree": 0}),
        ("rkd_distance", {"tokens": 1}),
        ("rkd_angle", {"tokens": 2}),
        ("minilm", {"heads": 0}),
        ("minilm", {"relations": []}),
        ("minilm", {"relations": ["outputs"]}),
        ("crd", {"temperature": 0}),
        ("mse", {"weight": 1}),
    ],
)
def test_impossible_options_are_refused(name, options):
    with pytest.raises(ValidationError):
        FEATURE_LOSSES.load(name).model_validate(options)


def test_the_page_has_a_row_for_every_loss_with_its_options_and_defaults():
    page = Path(__file__).parents[2] / "docs/features.md"
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    found = dict(rows)
    assert [name for name, _ in rows if name in FEATURE_LOSSES.names()] == FEATURE_LOSSES.names()
    for name in FEATURE_LOSSES.names():
        pairs = re.findall(r"`(\w+): ([^`]+)`", found[name])
        defaults = FEATURE_LOSSES.load(name)().model_dump(mode="json", exclude={"kind"})
        assert {key: json.loads(value) for key, value in pairs} == defaults
