"""Curves of what a cut costs: exact for power laws, monotone for anything, additive over axes."""

import numpy as np
import pytest

from trt_kd.architectures.shape import ModelShape
from trt_kd.pruning.depth import DepthAxis
from trt_kd.pruning.ffn import FfnAxis
from trt_kd.pruning.heads import HeadsAxis
from trt_kd.pruning.hidden import HiddenAxis
from trt_kd.pruning.sensitivity import Curve, Point, curves, predicted_nats, sizes_to_measure

SHAPE = ModelShape(
    model_type="llama", layers=24, hidden=512, ffn=1536, heads=8, kv_heads=4, head_dim=64,
    vocab=1000, tied=True,
)  # fmt: skip


def points(law, sizes=(1408, 1280, 1024, 768), kind="ffn", present=1536):
    return [Point(kind, size, present, law(1 - size / present)) for size in sizes]


@pytest.mark.parametrize("exponent", [1.0, 1.7, 3.0])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.4, 0.7])
def test_a_power_law_is_met_everywhere(exponent, share):
    curve = Curve(points(lambda r: 2.5 * r**exponent))
    assert curve(share) == pytest.approx(2.5 * share**exponent)


def test_points_are_met_exactly():
    measured = points(lambda r: 0.3 * r + r**3)
    for point in measured:
        assert Curve(measured)(point.share_cut) == pytest.approx(point.kl_nats)


def test_nothing_cut_costs_nothing():
    assert Curve(points(lambda r: r))(0.0) == 0.0


def test_one_point_grows_as_the_square():
    curve = Curve(points(lambda r: 0.2, sizes=(1024,)))
    assert curve(1 / 6) == pytest.approx(0.2 / 4)


def test_no_point_is_an_error():
    with pytest.raises(ValueError, match="at least one point"):
        Curve([])


@pytest.mark.parametrize("seed", range(20))
def test_more_is_never_cheaper_whatever_was_measured(seed):
    rng = np.random.default_rng(seed)
    measured = rng.uniform(0.0, 5.0, size=rng.integers(2, 6)) * rng.integers(0, 2)
    found = [Point("ffn", 90 - 10 * index, 100, nats) for index, nats in enumerate(measured)]
    curve = Curve(found)
    costs = [curve(share / 50) for share in range(40)]
    assert costs == sorted(costs)


def test_axes_add_up():
    axes = [FfnAxis(), DepthAxis()]
    fitted = curves(
        points(lambda r: r**2) + points(lambda r: 3 * r, sizes=(22, 20), kind="depth", present=24)
    )
    pruned = SHAPE.with_sizes(ffn=1152, layers=21)
    expected = 0.25**2 + 3 * 0.125
    assert predicted_nats(fitted, axes, SHAPE, pruned) == pytest.approx(expected)
    assert predicted_nats(fitted, axes, SHAPE, SHAPE) == 0.0


def test_sizes_to_measure_lie_on_the_grid_below_the_present_size():
    assert sizes_to_measure(FfnAxis(), SHAPE) == [1408, 1280, 1024, 768]
    assert sizes_to_measure(DepthAxis(), SHAPE) == [22, 20, 16, 12]


def test_an_axis_of_few_units_is_measured_at_what_it_has():
    assert sizes_to_measure(HeadsAxis(), SHAPE) == [1]


def test_sizes_that_the_stock_code_refuses_are_not_measured():
    nine = SHAPE.with_sizes(hidden=576, heads=9, kv_heads=3)
    assert sizes_to_measure(HiddenAxis(), nine) == []
