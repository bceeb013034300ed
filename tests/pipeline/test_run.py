"""A run does what is to do, once, and can be cut off anywhere."""

import json

import pytest

from trt_kd.artifacts import Artifact
from trt_kd.checkpoints import load_model
from trt_kd.errors import ArtifactError, TrtKdError
from trt_kd.pipeline.flow import steps, without_cut
from trt_kd.pipeline.plan import make_plan
from trt_kd.pipeline.recipe import load_recipe
from trt_kd.pipeline.run import check_disk, locked, rehearse, run
from trt_kd.pipeline.stages import STAGES, Stage
from trt_kd.stages.corners import Corner, PruningDoesNotPayError, verdict_of


@pytest.fixture
def ran(monkeypatch):
    """Names of the stages that did work, in order."""
    names = []
    real = Stage.run

    def recorded(self, config, **inputs):
        names.append(config.stage)
        return real(self, config, **inputs)

    monkeypatch.setattr(Stage, "run", recorded)
    return names


@pytest.mark.slow
def test_a_recipe_becomes_a_report_and_a_second_run_does_nothing(
    settings, recipe_file, tmp_path, ran
):
    recipe = load_recipe(recipe_file(settings))

    artifacts = run(recipe, tmp_path / "runs")

    report = json.loads((artifacts["report"].path / "report.json").read_text())
    assert report["schema_version"] == 1
    assert report["verdict"] == "pass"
    roles = [variant["role"] for variant in report["variants"]]
    assert sorted(roles) == sorted(
        ["teacher", "teacher_quantized", "pruned", "cross_entropy", "student", "student_quantized"]
    )
    assert load_model(artifacts["student"].path).config.intermediate_size == 64
    assert ran[:3] == ["import", "prune", "distill"]

    ran.clear()
    again = run(recipe, tmp_path / "runs")
    assert ran == []
    assert {name: a.key for name, a in again.items()} == {n: a.key for n, a in artifacts.items()}

    changed = load_recipe(recipe_file(settings), ["gates=[]"])
    run(changed, tmp_path / "runs")
    assert ran == ["report"]
    run(recipe, tmp_path / "runs")
    assert ran == ["report"], "the first report comes back from the superseded ones"


@pytest.mark.slow
def test_a_rehearsal_passes_through_every_stage_and_leaves_nothing(
    settings, recipe_file, tmp_path, ran
):
    search = {
        "axes": [{"kind": "ffn", "multiple_of": 8}, "depth"],
        "budget": {"params": "70%"},
        "search": {"tournament": {"contestants": 2, "steps": 3}},
    }
    recipe = load_recipe(recipe_file(settings | {"prune": settings["prune"] | search}))
    rehearse(recipe, tmp_path / "rehearsal")
    assert set(ran) == set(STAGES) - {"benchmark", "generate", "latency", "pair", "sensitivity"}
    assert not (tmp_path / "rehearsal").exists()


def test_where_pruning_does_not_pay_the_rest_is_done_and_the_report_says_why(
    settings, recipe_file, tmp_path, monkeypatch
):
    found = [Corner("int4", "unpruned", True, {"itl_ms": 5.0}, 0.19)]
    verdict = verdict_of(found, {"itl_ms": 6.0})
    real, names = Stage.run, []

    def refused(self, config, **inputs):
        names.append(config.stage)
        if config.stage == "prune":
            raise PruningDoesNotPayError(verdict, found)
        return real(self, config, **inputs)

    monkeypatch.setattr(Stage, "run", refused)
    recipe = load_recipe(recipe_file(settings))

    artifacts = run(recipe, tmp_path / "runs")

    assert set(artifacts) == {
        "teacher", "teacher-deploy-quantized", "teacher-deploy",
        "evaluate-teacher", "evaluate-teacher_quantized", "report",
    }  # fmt: skip
    told = json.loads((artifacts["report"].path / "report.json").read_text())
    assert [variant["role"] for variant in told["variants"]] == ["teacher", "teacher_quantized"]
    assert any("Pruning does not pay: the format alone" in note for note in told["notes"])
    assert told["verdict"] == "undecided"
    names.clear()
    run(recipe, tmp_path / "runs")
    assert names == ["prune"], "asked again, since nothing was cut; all else is done"


def test_what_reads_nothing_of_the_cut_is_left_as_it_was(settings, recipe_file):
    made = steps(load_recipe(recipe_file(settings)))
    left = {step.name: step for step in without_cut(made, "it does not pay")}
    gone = [step for step in made if step.name not in left]
    assert {"pruned", "student", "cross_entropy", "student-deploy"} <= {step.name for step in gone}
    for step in made:
        if step.name in left and step.stage not in ("benchmark", "report"):
            assert left[step.name] == step
    for step in left.values():
        assert set(step.inputs.values()) <= left.keys()
    assert "it does not pay" in left["report"].config.notes


def test_a_failing_step_leaves_the_finished_ones_and_nothing_half_written(
    settings, recipe_file, tmp_path, monkeypatch
):
    def broken(config, **inputs):
        raise TrtKdError("no")

    monkeypatch.setattr("trt_kd.stages.prune.prune", broken)
    root = tmp_path / "runs"
    with pytest.raises(TrtKdError, match="no"):
        run(load_recipe(recipe_file(settings)), root)
    assert sorted(path.name for path in root.iterdir()) == [".lock", "teacher"]
    states = {
        p.step.name: p.state for p in make_plan(load_recipe(recipe_file(settings)), root).steps
    }
    assert states["teacher"] == "done"
    assert states["pruned"] == "to do"


def test_an_input_that_was_changed_on_disk_stops_the_run(settings, recipe_file, tmp_path):
    recipe = load_recipe(recipe_file(settings))
    teacher = make_plan(recipe, tmp_path / "runs").steps[0]
    artifact = STAGES["import"].run(teacher.step.config, out=tmp_path / "runs" / "teacher")
    weights = artifact.path / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(ArtifactError, match="was changed"):
        run(recipe, tmp_path / "runs")


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with locked(tmp_path), pytest.raises(TrtKdError, match="another run"), locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_a_two_line_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"), locked(tmp_path / "file" / "run"):
        pass


def test_a_plan_that_does_not_fit_on_the_disk_is_refused(
    settings, recipe_file, tmp_path, monkeypatch
):
    plan = make_plan(load_recipe(recipe_file(settings)), tmp_path)
    monkeypatch.setattr("trt_kd.pipeline.run.free_bytes", lambda path: 1000)
    with pytest.raises(ArtifactError, match="GB free"):
        check_disk(plan)


def test_a_folder_in_the_way_is_not_touched(settings, recipe_file, tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "precious.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="in the way"):
        run(load_recipe(recipe_file(settings)), tmp_path)
    assert (tmp_path / "teacher" / "precious.txt").read_text() == "mine"


def test_an_opened_artifact_is_the_one_that_was_written(teacher):
    assert Artifact.open(teacher.path).manifest == teacher.manifest
