"""The search over the grid: an independent brute force, budgets, legality, the dry run's table."""

import json
import time
from dataclasses import replace
from itertools import product

import pytest

from trt_kd.architectures import architecture_of
from trt_kd.architectures.shape import ModelShape
from trt_kd.cli.candidates import candidates_json, print_candidates
from trt_kd.errors import ModelError
from trt_kd.pruning import AXES
from trt_kd.pruning import candidates as module
from trt_kd.pruning.budget import MB, Budget, memory_bytes
from trt_kd.pruning.candidates import (
    countable,
    enumerate_candidates,
    possible,
    resized,
    size_choices,
)
from trt_kd.pruning.catalogue import Target, refused
from trt_kd.pruning.depth import DepthAxis

DENSE = ModelShape(
    model_type="llama",
    layers=8,
    hidden=576,
    ffn=1536,
    heads=9,
    kv_heads=3,
    head_dim=64,
    vocab=4096,
    tied=True,
)
MIXTURE = replace(
    DENSE,
    tied=False,
    hidden=512,
    heads=8,
    kv_heads=4,
    experts=16,
    experts_per_token=4,
    expert_ffn=256,
    dense_layers=2,
)
WINDOWED = replace(DENSE, hidden=512, heads=8, kv_heads=2, window=128, window_layers=6)

DENSE_GRID = {
    "hidden": (96, 256, 320, 512, 576),
    "ffn": (100, *range(128, 1537, 128)),
    "layers": (4, 6, 8),
    "heads": (3, 6, 8, 9),
    "kv_heads": (1, 2, 3),
}
MIXTURE_GRID = {
    "experts": (2, 4, 8, 12, 16),
    "expert_ffn": range(32, 257, 32),
    "layers": (6, 7, 8),
    "hidden": (256, 320, 448, 512),
    "ffn": (768, 1536),
}
WINDOWED_GRID = {
    "layers": range(3, 9),
    "ffn": range(64, 1537, 64),
    "heads": (4, 8),
    "kv_heads": (1, 2),
    "vocab": (1000, 4000, 4096),
}
TRT = Target(format="int4_awq_64", runtime="trtllm", gpu="hopper", tensor_parallel=1)
SEARCHES = [
    (DENSE, DENSE_GRID, Budget(params=0.6), Target()),
    (DENSE, DENSE_GRID, Budget(params="60%", memory_mb=25, batch=4), TRT),
    (DENSE, DENSE_GRID, Budget(memory_mb=8, weight_format="int4_awq_64", kv_format="fp8"), TRT),
    (DENSE, {"ffn": range(64, 1537, 64)}, Budget(params=0.8), Target(format="int4_awq")),
    (MIXTURE, MIXTURE_GRID, Budget(params=0.5), Target()),
    (
        MIXTURE,
        MIXTURE_GRID,
        Budget(active_params=0.6, params=0.7),
        Target(format="nvfp4", runtime="vllm", gpu="blackwell", tensor_parallel=4),
    ),
    (WINDOWED, WINDOWED_GRID, Budget(memory_mb=30, tokens=4096, batch=2), Target()),
    (
        WINDOWED,
        WINDOWED_GRID,
        Budget(params=0.5),
        Target(format="fp8", runtime="trtllm", gpu="ada", tensor_parallel=2),
    ),
]


def costs(shape: ModelShape, budget: Budget) -> dict[str, float]:
    memory = memory_bytes(
        shape,
        weight_format=budget.weight_format,
        kv_format=budget.kv_format,
        batch=budget.batch,
        tokens=budget.tokens,
    )
    every = {
        "params": shape.parameters,
        "active_params": shape.active_parameters,
        "memory_mb": sum(memory.values()) / MB,
    }
    return {name: value for name, value in every.items() if getattr(budget, name) is not None}


def brute_force(shape, grid, budget, target, slack):
    """Point by point, with nothing but the public closed forms and checks."""
    limits = budget.limits(shape)
    fitting = []
    for sizes in product(*grid.values()):
        pruned = resized(shape, dict(zip(grid, sizes, strict=True)))
        found = costs(pruned, budget)
        if not refused(pruned, target, shape) and all(found[n] <= limits[n] for n in found):
            fitting.append((pruned, found))
    kept = {
        pruned
        for pruned, found in fitting
        if max(found[name] / limits[name] for name in found) >= 1 - slack
    }
    most = {name: max(found[name] for _, found in fitting) for name in limits}
    return kept, {
        name: {pruned for pruned, found in fitting if found[name] == most[name]} for name in limits
    }


@pytest.mark.parametrize(("shape", "grid", "budget", "target"), SEARCHES)
@pytest.mark.parametrize("slack", [0.05, 0.0])
def test_the_search_finds_what_a_brute_force_finds(shape, grid, budget, target, slack):
    found = enumerate_candidates(shape, grid, budget, target, slack=slack)
    shapes = [candidate.shape for candidate in found]
    kept, largest = brute_force(shape, grid, budget, target, slack)
    assert len(set(shapes)) == len(shapes)
    assert kept <= set(shapes)
    assert all(set(shapes) & best for best in largest.values())
    assert set(shapes) - kept <= set().union(*largest.values())


@pytest.mark.parametrize(("shape", "grid", "budget", "target"), SEARCHES)
def test_every_candidate_says_what_it_costs_and_keeps_the_budget(shape, grid, budget, target):
    limits = budget.limits(shape)
    used = []
    for candidate in enumerate_candidates(shape, grid, budget, target):
        pruned = candidate.shape
        assert pruned == resized(shape, candidate.changed)
        assert set(candidate.changed) <= set(pruned.changes(shape))
        assert candidate.parameters == pruned.parameters
        assert candidate.active_parameters == pruned.active_parameters
        assert candidate.share == pruned.parameters / shape.parameters
        assert budget.fits(pruned, shape)
        assert candidate.memory_bytes == pytest.approx(budget.bytes_of(pruned))
        illegal = [found for found in candidate.violations if found.severity == "illegal"]
        assert not any(set(found.fields) & set(candidate.changed) for found in illegal)
        used.append(max(value / limits[n] for n, value in costs(pruned, budget).items()))
    assert used == sorted(used, reverse=True)


@pytest.mark.parametrize(("shape", "grid", "budget", "target"), SEARCHES)
def test_the_size_of_a_block_changes_nothing(shape, grid, budget, target, monkeypatch):
    whole = enumerate_candidates(shape, grid, budget, target)
    monkeypatch.setattr(module, "_BLOCK", 30)
    assert enumerate_candidates(shape, grid, budget, target) == whole


def test_the_order_of_names_and_sizes_changes_nothing():
    shape, grid, budget, target = SEARCHES[0]
    backward = {name: [*grid[name], *grid[name]][::-1] for name in reversed(grid)}
    one, other = (enumerate_candidates(shape, g, budget, target) for g in (grid, backward))
    assert {c.shape for c in one} == {c.shape for c in other}


def test_a_present_size_is_never_refused_but_its_violation_is_told():
    target = Target(format="int4_awq", runtime="trtllm", gpu="hopper")
    found = enumerate_candidates(DENSE, {"ffn": range(64, 1537, 64)}, Budget(params=0.8), target)
    assert found
    for candidate in found:
        assert candidate.changed["ffn"] % 128 == 0
        assert {violation.size for violation in candidate.violations} == {"hidden", "heads"}


def test_the_largest_fit_is_kept_whatever_it_leaves():
    (only,) = enumerate_candidates(DENSE, {"ffn": [64, 1536]}, Budget(params=0.9), Target())
    assert only.changed == {"ffn": 64}
    assert only.share < 0.9 * 0.95


@pytest.mark.parametrize("shape", [DENSE, MIXTURE, WINDOWED])
def test_fewer_layers_leave_each_kind_its_share_as_the_depth_axis_does(shape):
    for layers in range(1, 9):
        assert resized(shape, {"layers": layers}) == DepthAxis(layers=layers).write(shape, layers)


def test_a_million_points_take_less_than_two_seconds():
    shape = replace(DENSE, layers=32, hidden=4096, ffn=14336, heads=32, kv_heads=8, head_dim=128)
    grid = {
        "hidden": range(64, 4097, 64),
        "ffn": range(128, 14337, 128),
        "layers": range(1, 33),
        "heads": (8, 16, 24, 32),
        "kv_heads": (4, 8),
    }
    target = Target(format="int4_awq", runtime="trtllm", gpu="hopper")
    started = time.perf_counter()
    found = enumerate_candidates(shape, grid, Budget(params=0.5, memory_mb=8000), target)
    assert time.perf_counter() - started < 2
    assert len(found) > 1000


@pytest.mark.parametrize(
    ("choices", "budget", "target", "what", "hint"),
    [
        (
            DENSE_GRID,
            Budget(params=1000),
            Target(),
            "none of the 2,340 combinations of sizes has at most 1,000 parameters",
            " parameters: raise the budget, or offer smaller sizes",
        ),
        ({"ffn": [512]}, Budget(memory_mb=1), Target(), "at most 1.0 MB", "MB: raise the budget"),
        ({"ffn": [2048]}, Budget(params=0.5), Target(), "ffn 2048 is larger", "at most 1536"),
        (
            {"ffn": [100, 200]},
            Budget(params=0.8),
            Target(format="int4_awq"),
            "none of the 2 combinations of sizes is legal for int4_awq on transformers (cpu)",
            "most break int4_blocks_128: inputs of a projection must",
        ),
        ({"ffn": [512]}, Budget(params=10**9), Target(), "fits the budget unpruned", "ask for"),
    ],
)
def test_an_impossible_search_is_a_two_line_error(choices, budget, target, what, hint):
    with pytest.raises(ModelError) as caught:
        enumerate_candidates(DENSE, choices, budget, target)
    first, second = str(caught.value).splitlines()
    assert what in first
    assert hint in second


def test_the_least_that_an_impossible_search_tells_is_true():
    with pytest.raises(ModelError) as caught:
        enumerate_candidates(DENSE, DENSE_GRID, Budget(params=1000), Target())
    shapes = (
        resized(DENSE, dict(zip(DENSE_GRID, sizes, strict=True)))
        for sizes in product(*DENSE_GRID.values())
    )
    least = min(s.parameters for s in shapes if not refused(s, Target(), DENSE))
    assert f"{least:,} parameters" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("choices", "slack", "problem"),
    [
        ({"ffn": [512]}, 1.5, "slack is a share"),
        ({}, 0.1, "no sizes to choose from"),
        ({"width": [512]}, 0.1, "unknown size 'width'; known: hidden, ffn"),
        ({"ffn": []}, 0.1, "sizes of ffn must be whole numbers above 0"),
        ({"ffn": [0, 64]}, 0.1, "sizes of ffn must be whole numbers above 0"),
    ],
)
def test_unusable_arguments_are_the_callers_mistake(choices, slack, problem):
    with pytest.raises(ValueError, match=problem):
        enumerate_candidates(DENSE, choices, Budget(params=0.5), Target(), slack=slack)


def test_the_dry_run_prints_sizes_costs_and_legality(capsys):
    target = Target(format="int4_awq", runtime="vllm", gpu="hopper")
    budget = Budget(params=0.6)
    found = enumerate_candidates(DENSE, DENSE_GRID, budget, target)
    print_candidates(found, DENSE, budget, target, limit=3)
    heading, _, columns, _, *rows = capsys.readouterr().out.splitlines()
    assert heading.startswith(f"{DENSE.parameters:,} parameters before; at most ")
    assert heading.endswith("for int4_awq on vllm (hopper)")
    assert columns.split()[-4:] == ["share", "memory", "MB", "legal"]
    assert rows[-1] == f"and {len(found) - 3} more; --json prints all"
    assert len(rows) == 3 + 2
    assert f"{found[0].parameters:,}" in rows[0]
    assert "as before, illegal: " in "".join(rows) or "yes" in "".join(rows)


def test_the_dry_run_tells_programs_every_reason(capsys):
    target = Target(format="int4_awq", runtime="vllm", gpu="hopper")
    budget = Budget(active_params=0.6)
    found = enumerate_candidates(MIXTURE, MIXTURE_GRID, budget, target)
    printed = json.loads(json.dumps(candidates_json(found, MIXTURE, budget, target)))
    assert printed["limits"] == {"active_params": 0.6 * MIXTURE.active_parameters}
    assert len(printed["candidates"]) == len(found)
    for row, candidate in zip(printed["candidates"], found, strict=True):
        assert row["sizes"] == candidate.changed
        assert [v["rule"] for v in row["violations"]] == [v.rule for v in candidate.violations]
    assert any(row["violations"] for row in printed["candidates"])
    print_candidates(found, MIXTURE, budget, target)
    assert " active " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shape", "kinds"),
    [
        (DENSE, ("ffn", "depth")),
        (DENSE, ("heads", "kv_heads", "ffn")),
        (DENSE, ("hidden", "heads")),
        (WINDOWED, ("ffn", "depth")),
        (MIXTURE, ("experts", "depth")),
    ],
)
def test_what_is_possible_fits_and_can_be_made_and_taken(shape, kinds):
    axes = [AXES.load(kind)() for kind in kinds]
    found = possible(axes, shape, Budget(params=0.7), Target())
    choices = size_choices(axes, shape)
    every = enumerate_candidates(shape, choices, Budget(params=0.7), Target(), slack=1)
    assert found == [one for one in every if one in found]
    for one in found:
        made = shape
        for axis in axes:
            made = axis.write(made, axis.read(one.shape))
        assert made == one.shape
        assert architecture_of(shape.model_type).takes(one.shape)
        assert one.parameters <= 0.7 * shape.parameters


def test_what_is_possible_keeps_the_sizes_that_are_given():
    axes = [AXES.load("ffn")(), AXES.load("depth")(layers=DENSE.layers - 1)]
    found = possible(axes, DENSE, Budget(params=0.8), Target())
    assert {one.shape.layers for one in found} == {DENSE.layers - 1}


def test_what_the_family_lacks_or_takes_in_no_size_is_refused_in_two_lines():
    with pytest.raises(ModelError, match=r"axis 'experts': .*\n  hint: "):
        possible([AXES.load("experts")()], DENSE, Budget(params=0.8), Target())
    odd = replace(DENSE, model_type="gpt_neox", derived_head_dim=True)
    with pytest.raises(ModelError, match=r"axis 'hidden': .*\n  hint: "):
        possible([AXES.load("hidden")()], odd, Budget(params=0.8), Target())
    derived = replace(DENSE, model_type="phi3", derived_head_dim=True)
    with pytest.raises(ModelError, match=r"that fit can be made\n  hint: .*phi3"):
        possible([AXES.load("hidden")()], derived, Budget(params=0.8), Target())


@pytest.mark.parametrize(
    ("shape", "kinds"),
    [
        (DENSE, ["ffn"]),
        (DENSE, ["kv_heads"]),
        (MIXTURE, ["experts"]),
        (replace(MIXTURE, vocab=2**18), ["experts"]),
        (replace(DENSE, vocab=2**18), ["kv_heads", "depth"]),
    ],
)
def test_where_only_time_is_limited_a_plan_counts_with_what_the_axes_can_reach(shape, kinds):
    axes = [AXES.load(kind)() for kind in kinds]
    timed = Budget(latency={"itl_ms": "70%"})
    budget = countable(timed, axes, shape, Target())
    grid = size_choices(axes, shape)
    least = min(
        resized(shape, dict(zip(grid, sizes, strict=True))).parameters
        for sizes in product(*grid.values())
    )
    wanted = max(0.8, (1 + least / shape.parameters) / 2 if least > 0.8 * shape.parameters else 0)
    assert budget == Budget(params=wanted)
    assert possible(axes, shape, budget, Target())[0].parameters < shape.parameters


def test_limits_that_can_be_counted_are_kept_when_those_on_time_go():
    axes = [AXES.load("ffn")()]
    timed = Budget(active_params=0.9, latency={"itl_ms": "70%"})
    assert countable(timed, axes, DENSE, Target()) == Budget(active_params=0.9)
