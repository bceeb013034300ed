"""The regression behind a refit: errors to make up for, judging by mixtures, its memory."""

import json

import numpy as np
import pytest
import torch

from trt_kd.pruning.reconstruction import Reconstruct, gram_bytes
from trt_kd.pruning.ridge import PLAIN, Gram, Moments, refit, solve


def moments_of(x_TC, e_TH=None):
    """Second moments of numpy arrays, in float64."""
    if e_TH is None:
        return Moments(torch.from_numpy(x_TC.T @ x_TC))
    cross, energy = torch.from_numpy(e_TH.T @ x_TC), float((e_TH**2).sum())
    return Moments(torch.from_numpy(x_TC.T @ x_TC), cross, energy)


@pytest.fixture
def case():
    """Inputs ``[T, C]``, errors ``[T, H]``, a projection ``[H, C]`` and what it keeps."""
    rng = np.random.default_rng(0)
    x_TC = rng.normal(size=(300, 8)) @ rng.normal(size=(8, 20)) + 0.3 * rng.normal(size=(300, 20))
    errors_TH = x_TC @ rng.normal(size=(20, 6)) + rng.normal(size=(300, 6))
    return x_TC, errors_TH, rng.normal(size=(6, 20)), np.sort(rng.permutation(20)[:13])


def least_squares(case, ridge, feedback):
    """The same by stacked least squares on the tokens themselves."""
    x_TC, errors_TH, weight_HC, keep = case
    damping = ridge * (x_TC**2).sum(axis=0).mean()
    rows = np.vstack([x_TC[:, keep], np.sqrt(damping) * np.eye(len(keep))])
    wanted = x_TC @ weight_HC.T + feedback * errors_TH
    goal = np.vstack([wanted, np.sqrt(damping) * weight_HC[:, keep].T])
    return np.linalg.lstsq(rows, goal, rcond=None)[0].T


@pytest.mark.parametrize("ridge", [1e-4, 0.1])
@pytest.mark.parametrize("feedback", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows", [640, 4])
def test_errors_are_made_up_for_as_least_squares_on_the_tokens_would(
    case, ridge, feedback, rows, monkeypatch
):
    monkeypatch.setattr("trt_kd.pruning.ridge.ROWS", rows)
    x_TC, errors_TH, weight_HC, keep = case
    lots = [moments_of(x_TC[:100], errors_TH[:100]), moments_of(x_TC[100:], errors_TH[100:])]
    found = solve(torch.from_numpy(weight_HC), lots, torch.from_numpy(keep), ridge, feedback)
    expected = least_squares(case, ridge, feedback)
    np.testing.assert_allclose(found.weight.numpy(), expected, rtol=1e-7, atol=1e-9)
    wanted = x_TC @ weight_HC.T + errors_TH
    for share, weight in ((found.residual, expected), (found.plain_residual, weight_HC[:, keep])):
        lost = ((wanted - x_TC[:, keep] @ weight.T) ** 2).sum()
        assert share == pytest.approx(lost / (wanted**2).sum(), rel=1e-9)


def gram_of(x_TC, errors_TH=None, length=10):
    """Statistics of tokens that came as sequences of ``length``."""
    gram, shape = Gram(), (-1, length)
    x_BLC = torch.from_numpy(x_TC).float().unflatten(0, shape)
    if errors_TH is None:
        gram.add(x_BLC)
    else:
        gram.add(x_BLC, torch.from_numpy(errors_TH).float().unflatten(0, shape))
    return gram


def test_nothing_cut_and_nothing_to_make_up_for_leaves_the_weights(case):
    x_TC, _, weight_HC, _ = case
    weight = torch.from_numpy(weight_HC)
    found = refit(weight, gram_of(x_TC), torch.arange(20), [0.01])
    assert torch.equal(found.weight, weight)
    assert (found.residual, found.plain_residual, found.ridge) == (0.0, 0.0, PLAIN)


def test_errors_alone_are_made_up_for(case):
    """A dropped run of layers is folded into a projection that loses no inputs."""
    x_TC, errors_TH, weight_HC, _ = case
    gram = gram_of(x_TC, errors_TH)
    found = refit(torch.from_numpy(weight_HC), gram, torch.arange(20), [1e-4], (0.0, 1.0))
    case = x_TC, errors_TH, weight_HC, np.arange(20)
    np.testing.assert_allclose(found.weight.numpy(), least_squares(case, 1e-4, 1.0), rtol=1e-2)
    assert found.residual < 0.2 * found.plain_residual


@pytest.mark.parametrize("tokens", [40, 300])
@pytest.mark.parametrize("outputs", [100, 400])
def test_random_mixtures_of_the_outputs_choose_the_ridge_that_all_would(
    tokens, outputs, monkeypatch
):
    rng = np.random.default_rng(tokens)
    x_TC = rng.normal(size=(tokens, 16)) @ rng.normal(size=(16, 48))
    x_TC += 0.5 * rng.normal(size=(tokens, 48))
    weight, keep = torch.from_numpy(rng.normal(size=(outputs, 48))), torch.arange(0, 48, 2)
    ridges = [1e-6, 1e-3, 1.0]
    monkeypatch.setattr("trt_kd.pruning.ridge.JUDGED", outputs)
    whole = refit(weight, gram_of(x_TC), keep, ridges)
    monkeypatch.setattr("trt_kd.pruning.ridge.JUDGED", 64)
    mixed = refit(weight, gram_of(x_TC), keep, ridges)
    assert mixed.ridge == whole.ridge
    torch.testing.assert_close(mixed.weight, whole.weight)


def test_a_system_without_a_solution_leaves_the_plain_cut():
    weight, keep = torch.randn(4, 8), torch.arange(5)
    gram = gram_of(np.ones((40, 8)))
    for half in gram.halves:
        half.gram.neg_()
    found = refit(weight, gram, keep, [0.1])
    assert torch.equal(found.weight, weight[:, keep])
    assert found.ridge == PLAIN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_solution_has_the_dtype_of_the_projection(case, dtype):
    x_TC, _, weight_HC, keep = case
    weight = torch.from_numpy(weight_HC).to(dtype)
    found = refit(weight, gram_of(x_TC), torch.from_numpy(keep), [0.01]).weight
    exact = refit(weight.double(), gram_of(x_TC), torch.from_numpy(keep), [0.01]).weight
    assert found.dtype == dtype
    assert torch.equal(found, exact.to(dtype))


def most_allocated(call, path):
    """Bytes that ``call`` held at once, over what was held before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    profile.export_chrome_trace(str(path))
    events = [
        event["args"]
        for event in json.loads(path.read_text())["traceEvents"]
        if event.get("name") == "[memory]"
    ]
    before = events[0]["Total Allocated"] - events[0]["Bytes"]
    return max(event["Total Allocated"] for event in events) - before


@pytest.mark.parametrize(("outputs", "inputs"), [(512, 768), (1024, 1024), (128, 1536)])
@pytest.mark.parametrize("with_errors", [False, True])
@pytest.mark.parametrize("kept", [0.5, 1.0])
def test_a_refit_holds_no_more_than_was_planned(outputs, inputs, with_errors, kept, tmp_path):
    torch.manual_seed(0)
    gram = Gram()
    errors_BLH = torch.randn(4, 32, outputs) if with_errors else None
    gram.add(torch.randn(4, 32, inputs), errors_BLH)
    weight, keep = torch.randn(outputs, inputs), torch.arange(int(kept * inputs))
    feedbacks = (0.0, 0.3, 1.0) if with_errors else (0.0,)

    def call():
        refit(weight, gram, keep, [0.01, 0.1], feedbacks)

    planned = Reconstruct().memory_bytes([inputs]) - gram_bytes(inputs)
    held = most_allocated(call, tmp_path / "trace.json")
    assert 0.2 * planned < held <= planned


@pytest.mark.parametrize(("accumulation", "precise"), [("float32", False), ("float64", True)])
def test_sums_over_tokens_are_taken_in_the_precision_asked_for(accumulation, precise):
    states_BLC = 1e3 + torch.rand(6, 50, 8, generator=torch.Generator().manual_seed(0))
    gram = Reconstruct(accumulation=accumulation).gram()
    gram.add(states_BLC)
    rows_TC = states_BLC.flatten(0, 1).double()
    found, expected = gram.sum.gram.double(), rows_TC.T @ rows_TC
    assert torch.allclose(found, expected, rtol=1e-13) == precise
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)
    assert gram.sum.gram.dtype == getattr(torch, accumulation)


def test_sums_in_float64_count_twice_in_the_plan():
    single, double = (Reconstruct(accumulation=name) for name in ("float32", "float64"))
    gram_bytes_more = double.memory_bytes([1024]) - single.memory_bytes([1024])
    assert gram_bytes_more == 3 * gram_bytes(1024)
