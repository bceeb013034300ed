"""Recipes are strict, inherit what they share, and every workflow plans."""

from pathlib import Path

import pytest

from trt_kd.errors import ConfigError, ModelError
from trt_kd.pipeline.plan import make_plan
from trt_kd.pipeline.recipe import load_recipe

WORKFLOWS = Path(__file__).parents[2] / "workflows"
PUBLISHED = {
    # teacher and student parameters as published, in thousands of millions
    "llama3.1-8b-to-4b-width-fp8": (8.03, 4.51),
    "qwen3-8b-to-6b-depth-fp8": (8.19, 5.88),
    "quickstart": (0.1345, 0.1013),
    # a stand-in: what a limit on time leaves is not known before it was timed
    "quickstart-latency": (0.1345, 0.1075),
}


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_workflow_plans_to_the_published_sizes(path, tmp_path):
    plan = make_plan(load_recipe(path), tmp_path)
    counts = tuple(shape.parameters / 1e9 for shape in (plan.shapes.teacher, plan.shapes.student))
    assert counts == pytest.approx(PUBLISHED[path.stem], rel=2e-3)
    assert not list(tmp_path.iterdir())
    assert all(planned.estimate.time_s > 0 for planned in plan.steps)


def test_data_and_seed_reach_every_section_that_does_not_set_its_own():
    recipe = load_recipe(
        WORKFLOWS / "quickstart.yaml",
        ["seed=7", "data.block_tokens=128", "evaluate.seed=3"],
    )
    assert recipe.distill.seed == recipe.prune.seed == recipe.export.also["fp8"].quantize.seed == 7
    assert recipe.evaluate.seed == 3
    assert recipe.evaluate.data.block_tokens == recipe.distill.data.block_tokens == 128


def test_three_mistakes_are_reported_at_once_with_their_paths():
    with pytest.raises(ConfigError) as caught:
        load_recipe(
            WORKFLOWS / "quickstart.yaml",
            ["distill.steps=-3", "prune.calibration_tokens=many", "shuffel=true"],
        )
    text = str(caught.value)
    assert "3 problem(s)" in text
    for path in ("distill.steps", "prune.calibration_tokens", "shuffel"):
        assert path in text


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("latency=null", "budget.latency needs measured times"),
        ("prune.budget={params: 80%}", "latency has no effect: no budget limits time"),
        ("latency.lanes={engine: trtllm-engine}", "trtllm-engine is not run here"),
        (
            "latency.input_tokens=[64, 512]",
            "2 pairs of lengths: 64 + 24, 512 + 24 tokens: name one",
        ),
        ("prune.budget.latency.input_tokens=65", "65 + any tokens are not in the latency table"),
        ("prune.budget.latency.itl_ms=fast", "write a number, or a percentage"),
        ("prune.budget.latency={batch: 4}", "at least one of itl_ms, ttft_ms and tokens_per_s"),
        ("prune.budget.latency={tokens_per_s: 80%}", "lies above 100%"),
    ],
)
def test_limits_on_time_and_their_table_go_together(override, problem):
    with pytest.raises(ConfigError) as caught:
        load_recipe(WORKFLOWS / "quickstart-latency.yaml", [override])
    assert problem in " ".join(str(caught.value).split())


def test_a_table_is_made_of_what_is_cut_along_its_open_axes(tmp_path):
    recipe = load_recipe(WORKFLOWS / "quickstart-latency.yaml")
    planned = {one.step.name: one.step for one in make_plan(recipe, tmp_path).steps}
    assert dict(planned["latency"].inputs) == {"source": "teacher"}
    assert planned["latency"].config.axes == recipe.prune.axes
    assert set(planned["pruned"].inputs) == {"source", "scores", "latency"}


def test_a_rehearsal_shrinks_every_section_and_changes_every_key(tmp_path):
    recipe = load_recipe(WORKFLOWS / "quickstart.yaml")
    whole = {step.step.name: step.key for step in make_plan(recipe, tmp_path).steps}
    small = {step.step.name: step.key for step in make_plan(recipe.rehearsal(), tmp_path).steps}
    assert whole.keys() == small.keys()
    assert not set(whole.values()) & set(small.values())
    assert recipe.rehearsal().distill.steps <= 2


def test_a_runtime_of_a_variant_that_is_not_measured_is_refused(tmp_path):
    quickstart = WORKFLOWS / "quickstart.yaml"
    compiled = "{kind: transformers, compile: true}"
    plan = make_plan(load_recipe(quickstart, [f"benchmark.backends.student={compiled}"]), tmp_path)
    planned = {one.step.name: one.step for one in plan.steps}
    assert planned["benchmark"].config.backends["student"].compile
    with pytest.raises(ConfigError, match=r"no variant 'pupil'\n  hint: available: teacher, "):
        make_plan(load_recipe(quickstart, [f"benchmark.backends.pupil={compiled}"]), tmp_path)


def test_what_cannot_be_run_here_is_refused_where_it_would_be_measured(tmp_path):
    engine = "{lane: {kind: tensorrt-rtx}}"
    quickstart = WORKFLOWS / "quickstart.yaml"
    make_plan(load_recipe(quickstart, [f"export.also.engine={engine}"]), tmp_path)
    with pytest.raises(ModelError, match=r"export\.deploy: tensorrt-rtx is not run here"):
        make_plan(load_recipe(quickstart, [f"export.deploy={engine}"]), tmp_path)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("{quantize: {format: {kind: mixed}}, lane: trtllm-checkpoint}", "format mixed is not"),
        (
            "{quantize: {format: {kind: recipe, name: fp8_default-kv_fp8}}, lane: trtllm-engine}",
            "format recipe is not",
        ),
        (
            "{quantize: {format: int4_awq}, lane: {kind: trtllm-checkpoint, dtype: float32}}",
            r"(?s:.*)INT4 codes are multiplied in 16 bits",
        ),
    ],
)
def test_a_format_that_a_lane_does_not_write_is_refused_before_anything_runs(
    tmp_path, spec, reason
):
    quickstart = WORKFLOWS / "quickstart.yaml"
    with pytest.raises(ModelError, match=rf"export\.also\.engine: {reason}"):
        make_plan(load_recipe(quickstart, [f"export.also.engine={spec}"]), tmp_path)
