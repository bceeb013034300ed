"""A corrected teacher and assistants: who is made from whom, and what the report still shows."""

import json

import pytest

from trt_kd.checkpoints import load_model
from trt_kd.errors import ConfigError
from trt_kd.pipeline.flow import steps
from trt_kd.pipeline.plan import make_plan
from trt_kd.pipeline.recipe import load_recipe
from trt_kd.pipeline.run import run
from trt_kd.training.schedule import Schedule

CORRECT = {"correct": {"steps": 3, "batch_size": 2, "precision": "fp32"}}
BETWEEN = [{"kind": "ffn", "size": 96, "multiple_of": 32}]
ASSISTANTS = {"assistants": [{"axes": BETWEEN, "calibration_tokens": 128}]}


@pytest.fixture
def inputs_of(settings, recipe_file):
    def read(changes):
        recipe = load_recipe(recipe_file(settings | changes))
        return {step.name: dict(step.inputs) for step in steps(recipe)}

    return read


def test_everything_after_the_correction_uses_it_and_the_baselines_do_not(inputs_of):
    inputs = inputs_of(CORRECT)
    assert inputs["corrected"] == {"student": "teacher"}
    assert inputs["pruned"] == {"source": "corrected"}
    assert inputs["student"] == {"teacher": "corrected", "student": "pruned"}
    assert inputs["cross_entropy"] == {"student": "pruned"}
    assert inputs["teacher-deploy-quantized"] == {"source": "teacher"}
    evaluations = {name: made for name, made in inputs.items() if name.startswith("evaluate-")}
    assert {made["teacher"] for made in evaluations.values()} == {"teacher"}
    assert evaluations["evaluate-corrected"]["model"] == "corrected"
    assert inputs["report"]["teacher.model"] == "teacher"
    assert inputs["report"]["corrected.model"] == "corrected"


def test_each_assistant_is_cut_from_and_taught_by_the_model_before_it(inputs_of):
    inputs = inputs_of(CORRECT | ASSISTANTS)
    assert inputs["assistant-1-pruned"] == {"source": "corrected"}
    assert inputs["assistant-1"] == {"teacher": "corrected", "student": "assistant-1-pruned"}
    assert inputs["pruned"] == {"source": "assistant-1"}
    assert inputs["student"] == {"teacher": "assistant-1", "student": "pruned"}


def test_without_either_the_flow_is_as_it_was(inputs_of):
    names = inputs_of({})
    assert "corrected" not in names
    assert not [name for name in names if "assistant" in name or "corrected" in name]
    assert names["student"] == {"teacher": "teacher", "student": "pruned"}


def test_the_correction_reads_the_text_of_distill_under_the_seed_of_the_recipe(
    settings, recipe_file
):
    recipe = load_recipe(recipe_file(settings | CORRECT | {"seed": 7}))
    (config,) = [step.config for step in steps(recipe) if step.name == "corrected"]
    assert config.data == recipe.distill.data == recipe.data
    assert (config.seed, config.steps, config.task_weight, config.response_weight) == (7, 3, 1, 0)
    for name in Schedule.model_fields:
        assert getattr(config, name) == getattr(recipe.correct, name)


def test_assistants_inherit_data_and_seed_and_are_rehearsed(settings, recipe_file):
    recipe = load_recipe(recipe_file(settings | CORRECT | ASSISTANTS | {"seed": 7}))
    (assistant,) = recipe.assistants
    assert (assistant.seed, assistant.data) == (7, recipe.data)
    small = recipe.rehearsal()
    assert small.correct.steps == 2
    assert small.assistants == [assistant.rehearsal()]


def test_a_plan_warns_of_a_large_gap_and_an_assistant_narrows_it(settings, recipe_file, tmp_path):
    hidden = {"kind": "hidden", "size": 32, "multiple_of": 32}
    tiny = {"axes": [hidden, {"kind": "ffn", "size": 64}, {"kind": "depth", "layers": 1}]}
    cut = {"prune": settings["prune"] | tiny}
    (warning,) = make_plan(load_recipe(recipe_file(settings | cut)), tmp_path).warnings
    assert warning.startswith("student has 16% of the parameters")
    between = {"axes": [{"kind": "ffn", "size": 64}, {"kind": "depth", "layers": 2}]}
    chain = settings | cut | {"assistants": [settings["prune"] | between]}
    assert make_plan(load_recipe(recipe_file(chain)), tmp_path).warnings == ()
    assert make_plan(load_recipe(recipe_file(settings)), tmp_path).warnings == ()


@pytest.mark.parametrize("changes", [CORRECT, ASSISTANTS])
def test_a_served_teacher_can_be_neither_corrected_nor_assisted(settings, recipe_file, changes):
    served = {"kind": "served", "url": "http://127.0.0.1:1/v1", "model": "m"}
    distill = {"distill": settings["distill"] | {"teacher": served}}
    with pytest.raises(ConfigError, match="no effect on a served teacher"):
        load_recipe(recipe_file(settings | distill | changes))


def test_the_vocabulary_may_not_be_cut_by_an_assistant(settings, recipe_file):
    cut = {"assistants": [{"axes": [{"kind": "vocab", "size": 400}]}]}
    with pytest.raises(ConfigError, match="vocab changes the tokens"):
        load_recipe(recipe_file(settings | cut))


@pytest.mark.slow
def test_a_whole_run_corrects_assists_and_reports_the_original(settings, recipe_file, tmp_path):
    recipe = load_recipe(recipe_file(settings | CORRECT | ASSISTANTS))
    artifacts = run(recipe, tmp_path / "runs")
    assert load_model(artifacts["assistant-1"].path).config.intermediate_size == 96
    assert artifacts["corrected"].key in artifacts["student"].manifest.lineage
    report = json.loads((artifacts["report"].path / "report.json").read_text(encoding="utf-8"))
    rows = {variant["role"]: variant for variant in report["variants"]}
    assert rows["teacher"]["quality"]["kl_to_teacher_nats"] == 0
    assert rows["corrected"]["quality"]["kl_to_teacher_nats"] > 0
    assert rows["corrected"]["parameters_share"] == 1
    assert rows["pruned"]["artifacts"]["model"] == artifacts["pruned"].key
