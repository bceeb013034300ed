"""Terms on features by themselves: projectors under every normalisation, memories, their file."""

import pytest
import torch

from trt_kd.losses import PROJECTORS
from trt_kd.training.feature_terms import FILE, Both, FeatureTerms
from trt_kd.training.features import Feature

STUDENT, TEACHER = 6, 10
MASK = torch.ones(2, 7, dtype=torch.bool)


def terms(*features, seed=0):
    validated = [Feature.model_validate(feature) for feature in features]
    return FeatureTerms(validated, (STUDENT, TEACHER), steps=10, seed=seed)


def both(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    sides = [
        {(n, "states"): torch.randn(2, 8, width, generator=generator).to(dtype) for n in range(3)}
        for width in (STUDENT, TEACHER)
    ]
    return Both(*sides)


@pytest.mark.parametrize("name", [name for name in PROJECTORS.names() if name != "none"])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("normalise", ["none", "standardise", "batch", "whiten"])
def test_every_projector_learns_under_every_normalisation(name, side, normalise):
    projector = {"kind": name, "side": side}
    made = terms({"loss": "mse", "pairs": [[0, 1]], "projector": projector, "normalise": normalise})
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.03)
    values = []
    for _ in range(15):
        optimizer.zero_grad()
        (total,) = (part.value for part in made.parts(both(dtype=torch.bfloat16), MASK, 0).values())
        total.backward()
        optimizer.step()
        values.append(total.item())
    assert total.dtype == torch.float32
    assert values[-1] < values[0]


def test_every_pair_has_a_projector_of_its_own_and_the_seed_decides_it():
    feature = {"loss": "mse", "pairs": [[0, 0], [1, 1]], "projector": "linear"}
    before = torch.random.get_rng_state()
    one, same, other = (terms(feature, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(one) == 2
    first, second = one.values()
    assert not torch.equal(first, second)
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    assert not torch.equal(first, next(iter(other.values())))


def test_a_memory_holds_the_latest_tokens_of_whole_steps(tmp_path):
    crd = {"kind": "crd", "memory": 20}
    made = terms({"loss": crd, "pairs": [[0, 1]], "projector": "linear"})
    (term,) = made.terms
    assert term.waits
    assert made.parts(both(0), MASK, 0) == {}
    assert not len(term.memory)  # within a step all passes see the same memory
    made.remember()
    first = both(0).teacher[1, "states"][:, :7].flatten(0, 1)
    torch.testing.assert_close(term.memory, first)
    value = made.parts(both(1), MASK, 1)["feature_crd_0_1"].value
    made.remember()
    second = both(1).teacher[1, "states"][:, :7].flatten(0, 1)
    torch.testing.assert_close(term.memory, torch.cat([first, second])[-20:])
    assert value > 0

    made.save(tmp_path)
    again = terms({"loss": crd, "pairs": [[0, 1]], "projector": "linear"}, seed=9)
    again.resumed(tmp_path)
    torch.testing.assert_close(again.state_dict(), made.state_dict(), rtol=0, atol=0)
    expected, found = (x.parts(both(2), MASK, 2)["feature_crd_0_1"].value for x in (made, again))
    assert torch.equal(expected, found)


def test_terms_without_anything_to_keep_are_saved_and_taken_up_too(tmp_path):
    made = terms({"loss": "pkt", "pairs": [[0, 1]]})
    made.save(tmp_path)
    assert (tmp_path / FILE).is_file()
    assert made.resumed(tmp_path) is made
    assert made.resumed(None) is made


def test_a_term_that_has_ended_is_not_read():
    made = terms(
        {"loss": "pkt", "pairs": [[0, 1]], "until_step": 3, "alone": True},
        {"loss": "gram", "pairs": [[2, 2]]},
    )
    assert [len(made.at(step)) for step in (0, 2, 3, 9)] == [2, 2, 1, 1]
    assert [made.alone(step) for step in (0, 2, 3)] == [True, True, False]


def test_pairs_that_are_not_written_out_are_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="rule cka"):
        terms({"loss": "pkt", "pairs": "cka"})
