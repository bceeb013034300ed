"""Projectors and normalisations: shapes, the manifold, statistics of the valid tokens only."""

import math

import pytest
import torch

from trt_kd.losses import PROJECTORS
from trt_kd.losses.features.normalising import normalised

TRAINED = [name for name in PROJECTORS.names() if name != "none"]


def test_none_is_no_module():
    assert PROJECTORS.load("none")().build(4, 8) is None
    assert not PROJECTORS.load("none")().on_teacher


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("widths", [(4, 8), (8, 4), (6, 6)])
def test_a_projector_maps_one_width_to_the_other_and_learns(name, widths):
    torch.manual_seed(0)
    module = PROJECTORS.load(name)().build(*widths)
    x = torch.randn(2, 3, widths[0])
    assert module(x).shape == (2, 3, widths[1])
    before = [p.detach().clone() for p in module.parameters()]
    module(x).square().sum().backward()
    torch.optim.AdamW(module.parameters(), lr=0.1).step()
    assert any(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert {p.dtype for p in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", TRAINED)
def test_the_same_seed_builds_the_same_projector(name):
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(PROJECTORS.load(name)().build(5, 7).state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("widths", [(4, 8), (8, 4), (6, 6)])
def test_an_orthogonal_projector_stays_on_the_manifold_while_it_learns(widths):
    torch.manual_seed(0)
    module = PROJECTORS.load("orthogonal")().build(*widths)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    start = module.weight.detach().clone()
    x, y = torch.randn(50, widths[0]), 3 * torch.randn(50, widths[1])
    for _ in range(30):
        optimizer.zero_grad()
        (module(x) - y).square().mean().backward()
        optimizer.step()
    weight = module.weight.detach()
    product = weight @ weight.mT if widths[1] <= widths[0] else weight.mT @ weight
    torch.testing.assert_close(product, torch.eye(min(widths)), atol=1e-5, rtol=0)
    assert (weight - start).abs().max() > 0.1


def test_an_orthogonal_projector_can_be_saved_and_loaded():
    torch.manual_seed(0)
    one, other = (PROJECTORS.load("orthogonal")().build(4, 8) for _ in range(2))
    assert not torch.equal(one.weight, other.weight)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("name", TRAINED)
def test_the_side_is_the_students_unless_it_says_otherwise(name):
    assert not PROJECTORS.load(name)().on_teacher
    assert PROJECTORS.load(name)(side="teacher").on_teacher


# --- normalisation ------------------------------------------------------------------------------


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    student = 3 + 2 * torch.randn(4, 50, 6, generator=generator, dtype=torch.float64)
    teacher = 1 + torch.randn(4, 50, 6, generator=generator, dtype=torch.float64) @ mix
    mask = torch.ones(4, 50, dtype=torch.bool)
    mask[1, 10:] = False
    return student, teacher, mask


def test_none_leaves_features_as_they_are_but_wide(batch):
    student, teacher, mask = batch
    found = normalised("none", student.bfloat16(), teacher, mask)
    assert [x.dtype for x in found] == [torch.float32, torch.float64]
    assert torch.equal(found[1], teacher)


def test_standardise_gives_every_token_mean_0_and_variance_1(batch):
    for x in normalised("standardise", *batch):
        torch.testing.assert_close(x.mean(-1), torch.zeros(4, 50, dtype=x.dtype))
        torch.testing.assert_close(
            x.var(-1, correction=0), torch.ones(4, 50, dtype=x.dtype), rtol=1e-3, atol=0
        )


def test_batch_gives_every_channel_mean_0_and_variance_1_over_the_valid_tokens(batch):
    mask = batch[2]
    for x in normalised("batch", *batch):
        rows = x[mask]
        torch.testing.assert_close(rows.mean(0), torch.zeros(6, dtype=x.dtype))
        torch.testing.assert_close(
            rows.var(0, correction=0), torch.ones(6, dtype=x.dtype), rtol=1e-3, atol=0
        )


def test_whiten_makes_the_teachers_channels_uncorrelated_and_leaves_the_student(batch):
    student, teacher, mask = batch
    found, white = normalised("whiten", student, teacher, mask)
    assert torch.equal(found, student)
    rows = white[mask]
    covariance = rows.mT @ rows / len(rows)
    off = covariance - covariance.diagonal().diag()
    assert off.abs().max() < 0.1
    assert ((covariance.diagonal() > 0.5) & (covariance.diagonal() < 1.001)).all()
    torch.testing.assert_close(rows.mean(0), torch.zeros(6, dtype=rows.dtype))


def test_whiten_with_fewer_tokens_than_channels_is_finite():
    teacher = torch.randn(1, 3, 40)
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert bool(normalised("whiten", teacher, teacher, mask)[1].isfinite().all())


@pytest.mark.parametrize("how", ["none", "standardise", "batch", "whiten"])
def test_masked_tokens_do_not_change_what_valid_ones_become(how, batch):
    student, teacher, mask = batch
    clean = normalised(how, student, teacher, mask)
    dirty = [x.clone() for x in (student, teacher)]
    for x in dirty:
        x[~mask] = math.nan
    for one, other in zip(clean, normalised(how, *dirty, mask), strict=True):
        torch.testing.assert_close(one[mask], other[mask], rtol=0, atol=0)
    nothing = torch.zeros_like(mask)
    assert [x.shape for x in normalised(how, student, teacher, nothing)] == [student.shape] * 2
