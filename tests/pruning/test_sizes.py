"""Planned sizes: solved from a share, on the grid, errors in two lines; no torch."""

import subprocess
import sys
from dataclasses import replace

import pytest

from trt_kd.architectures.shape import ModelShape
from trt_kd.config import validate
from trt_kd.errors import ConfigError, ModelError
from trt_kd.pruning.budget import Budget
from trt_kd.pruning.depth import DepthAxis
from trt_kd.pruning.ffn import FfnAxis
from trt_kd.pruning.hidden import HiddenAxis
from trt_kd.pruning.sizes import planned_shape
from trt_kd.stages.prune import PruneConfig

SMOLLM2 = ModelShape(
    model_type="llama",
    layers=30,
    hidden=576,
    ffn=1536,
    heads=9,
    kv_heads=3,
    head_dim=64,
    vocab=49152,
    tied=True,
)


def test_explicit_sizes_replace_the_models():
    axes = [FfnAxis(size=1024), HiddenAxis(size=512), DepthAxis(drop=(3, 4))]
    shape = replace(SMOLLM2, model_type="mistral")
    assert planned_shape(axes, None, shape) == replace(shape, ffn=1024, hidden=512, layers=28)


@pytest.mark.parametrize("axis", [FfnAxis(), HiddenAxis(), DepthAxis()])
@pytest.mark.parametrize("share", [0.95, 0.82, 0.6])
def test_a_share_gives_the_largest_legal_size_that_fits(axis, share):
    shape = replace(SMOLLM2, model_type="mistral")
    planned = planned_shape([axis], Budget(params=share), shape)
    assert planned.parameters <= share * shape.parameters
    size = getattr(planned, axis.shape_field)
    larger = next(legal for legal in axis.legal(shape) if legal > size)
    assert replace(planned, **{axis.shape_field: larger}).parameters > share * shape.parameters


def test_a_hidden_size_that_the_family_refuses_is_not_solved_for():
    """No multiple of 64 below 576 is one of nine heads, and a Llama's config wants that."""
    with pytest.raises(ModelError, match="cannot bring the model to"):
        planned_shape([HiddenAxis()], Budget(params=0.8), SMOLLM2)


def test_a_share_of_four_fifths_of_smollm2_is_a_width_of_960():
    assert planned_shape([FfnAxis()], Budget(params=0.80), SMOLLM2).ffn == 960
    assert planned_shape([FfnAxis()], Budget(params=0.82), SMOLLM2).ffn == 1024


def test_a_share_counts_what_the_other_axes_cut():
    planned = planned_shape([FfnAxis(), DepthAxis(layers=27)], Budget(params=0.80), SMOLLM2)
    assert planned.layers == 27
    assert planned.ffn > planned_shape([FfnAxis()], Budget(params=0.80), SMOLLM2).ffn


@pytest.mark.parametrize(
    ("axes", "share", "error", "what", "hint"),
    [
        ([FfnAxis(size=2048)], None, ModelError, "2048 is larger than the model's 1536", "1536"),
        ([FfnAxis(size=1000)], None, ModelError, "1000 is off the grid", "960 and 1024"),
        ([HiddenAxis(size=32)], None, ModelError, "32 is off the grid", "64"),
        ([DepthAxis(layers=31)], None, ModelError, "31 is larger", "30"),
        ([DepthAxis(drop=(30,))], None, ConfigError, "cannot drop layers", "0 to 29"),
        ([FfnAxis()], 0.1, ModelError, "cannot bring the model to", "smallest size"),
        ([FfnAxis()], None, ConfigError, "'ffn' has no size", "a budget"),
        ([FfnAxis(), DepthAxis()], 0.8, ConfigError, "size: ffn, depth", "every axis but one"),
        ([FfnAxis(size=64)], 0.8, ConfigError, "found none", "leave out"),
        ([FfnAxis(size=64), FfnAxis(size=128)], None, ConfigError, "stands twice", "once"),
    ],
)
def test_an_impossible_request_says_what_and_how_to_go_on(axes, share, error, what, hint):
    with pytest.raises(error) as caught:
        planned_shape(axes, share and Budget(params=share), SMOLLM2)
    first, second = str(caught.value).splitlines()
    assert what in first
    assert hint in second


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"axes": []}, "axes: List should have at least 1 item"),
        ({"axes": ["fnn"]}, "unknown pruning axis 'fnn'"),
        ({"axes": ["ffn"]}, "axis 'ffn' has no size"),
        ({"axes": ["ffn"], "budget": {"params": 1.5}}, "a share lies between 0 and 1"),
        (
            {"axes": [{"kind": "ffn", "size": 64}], "importance": "block_influence"},
            "does not rank channels",
        ),
        (
            {"axes": [{"kind": "depth", "layers": 2, "importance": "activation"}]},
            "does not rank layers",
        ),
        ({"axes": [{"kind": "depth", "layers": 2}], "importance": "random"}, "leave it out"),
        ({"axes": [{"kind": "depth", "layers": 2, "drop": [1]}]}, "leave out 'layers'"),
        ({"axes": [{"kind": "depth", "drop": [1, 1]}]}, "stands twice"),
    ],
)
def test_wrong_settings_are_refused_before_anything_runs(settings, problem):
    with pytest.raises(ConfigError, match="problem") as caught:
        validate(PruneConfig, settings, where="prune")
    assert problem in str(caught.value)


def test_a_plan_needs_no_torch():
    code = (
        "import sys\n"
        "from trt_kd.architectures.shape import ModelShape\n"
        "from trt_kd.stages.prune import PruneConfig\n"
        f"shape = {SMOLLM2!r}\n"
        "config = PruneConfig.model_validate({'axes': ['ffn'], 'budget': {'params': 0.8}})\n"
        "config.planned(shape), config.memory_bytes(shape), config.rehearsal()\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'modelopt')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_rehearsal_suits_the_twin_of_two_layers():
    twin = replace(SMOLLM2, layers=2, model_type="mistral")
    for settings in (
        {"axes": ["ffn"], "budget": {"params": 0.8}},
        {"axes": ["hidden"], "budget": {"params": 0.6}},
        {"axes": ["depth"], "budget": {"params": 0.6}},
        {"axes": [{"kind": "ffn", "size": 1024}, {"kind": "depth", "drop": [12, 13]}]},
        {"axes": ["ffn", {"kind": "depth", "layers": 24}], "budget": {"params": 0.7}},
    ):
        config = PruneConfig.model_validate(settings).rehearsal()
        assert config.planned(twin).parameters < twin.parameters
        assert config.blocks() == 2


def test_settings_round_trip_with_the_options_of_their_plugins():
    axes = [{"kind": "ffn", "size": 128, "multiple_of": 32}, {"kind": "depth", "drop": [1, 2]}]
    config = PruneConfig.model_validate({"axes": axes, "importance": "random"})
    dumped = config.model_dump(mode="json")
    assert dumped["axes"][0] == axes[0]
    assert dumped["importance"] == {"kind": "random"}
    assert PruneConfig.model_validate(dumped) == config
