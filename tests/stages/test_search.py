"""Score once, then search: the best measured candidate is kept, and a kill costs one candidate."""

import json
import shutil

import numpy as np
import pytest
import torch

from trt_kd.architectures.shape import read_shape
from trt_kd.artifacts import work_directory
from trt_kd.checkpoints import load_model
from trt_kd.errors import ConfigError, ModelError, TrtKdError
from trt_kd.pruning.scores import Scores
from trt_kd.pruning.sensitivity import read_points
from trt_kd.reporting import search_tables
from trt_kd.reporting.markdown import report_markdown
from trt_kd.reporting.page import page
from trt_kd.reporting.search_figure import search_figures
from trt_kd.stages import choosing, cutting
from trt_kd.stages.prune import PruneConfig, prune
from trt_kd.stages.report import ReportConfig, make_report
from trt_kd.stages.score import ScoreConfig, score, scoring_of


@pytest.fixture(scope="module")
def settings(data):
    return {
        "axes": [{"kind": "ffn", "multiple_of": 8}, "heads", "depth"],
        "budget": {"params": 0.85},
        "calibration_tokens": 256,
        "search": {
            "top_k": 3,
            "max_width_pruning": 0.6,
            "max_depth_pruning": 0.5,
            "check_tokens": 128,
        },
        "data": data,
    }


@pytest.fixture(scope="module")
def config(settings):
    return PruneConfig.model_validate(settings)


@pytest.fixture(scope="module")
def scores(config, teacher, tmp_path_factory):
    small = scoring_of(config).model_copy(update={"cut_tokens": 128, "check_tokens": 128})
    return score(small, source=teacher, out=tmp_path_factory.mktemp("scored") / "scores")


@pytest.fixture(scope="module")
def found(config, teacher, scores, tmp_path_factory):
    out = tmp_path_factory.mktemp("searched") / "pruned"
    return prune(config, source=teacher, scores=scores, out=out)


def test_scores_are_those_that_pruning_takes_by_itself(config, teacher, scores):
    blocks = np.arange(256).reshape(8, 32) % 500
    model = load_model(teacher.path, dtype="float32")
    kept, measured = cutting.score_model(scoring_of(config), model, blocks)
    assert measured["calibration_tokens"] == 256
    cut = PruneConfig(axes=[{"kind": "ffn", "size": 64}], data=config.data, seed=0)
    with_scores, without = (load_model(teacher.path, dtype="float32") for _ in range(2))
    folder = work_directory(scores.path)
    folder.mkdir()
    kept.save(folder)
    cutting.prune_model(cut, with_scores, blocks, folder)
    cutting.prune_model(cut, without, blocks)
    shutil.rmtree(folder)
    for one, other in zip(with_scores.parameters(), without.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_every_axis_has_points_and_scores(scores):
    assert {point.kind for point in read_points(scores.path)} == {"ffn", "heads", "depth"}
    assert set(Scores.load(scores.path).channels) == {"ffn", "heads"}
    assert scores.metrics["importance_pass_s"] > 0
    assert all(point.kl_nats > 0 for point in read_points(scores.path))


def test_the_winner_is_the_best_measured_candidate(found, config, teacher):
    record = found.metrics["search"]
    best = min(record["measured"], key=lambda row: row["divergence_nats"])
    shape = read_shape(found.path)
    assert record["winner"] == best["name"]
    assert shape.parameters == best["parameters"] == found.metrics["parameters_after"]
    assert shape.parameters <= 0.85 * read_shape(teacher.path).parameters
    assert len(record["measured"]) == 3
    assert load_model(found.path).num_parameters() == shape.parameters


def test_candidates_come_in_the_order_of_their_predictions(found):
    predicted = [row["predicted_nats"] for row in found.metrics["search"]["measured"]]
    assert predicted == sorted(predicted)


def test_no_state_is_left_beside_the_result(found):
    assert [path.name for path in found.path.parent.iterdir()] == ["pruned"]
    assert not (found.path / "result.json").exists()


def test_a_kill_costs_one_candidate(found, config, teacher, scores, tmp_path, monkeypatch):
    made = []
    real = choosing.cut_checkpoint

    def killed(*arguments, **named):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(arguments[3].name)
        return real(*arguments, **named)

    monkeypatch.setattr(choosing, "cut_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(config, source=teacher, scores=scores, out=tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()
    made.clear()
    monkeypatch.setattr(choosing, "cut_checkpoint", lambda *a, **k: made.append(0) or real(*a, **k))
    resumed = prune(config, source=teacher, scores=scores, out=tmp_path / "pruned")
    assert len(made) == 1
    assert resumed.manifest.files == found.manifest.files
    assert resumed.metrics["search"] == found.metrics["search"]


@pytest.fixture(scope="module")
def contested(settings, teacher, scores, tmp_path_factory):
    """What a search with a tournament found."""
    tournament = {"contestants": 3, "steps": 2, "batch_size": 2, "top_k": 16}
    search = settings["search"] | {"tournament": tournament}
    config = PruneConfig.model_validate(settings | {"search": search})
    out = tmp_path_factory.mktemp("contested") / "pruned"
    return prune(config, source=teacher, scores=scores, out=out)


def test_a_tournament_trains_the_best_and_says_how_sure_it_is(contested):
    made = contested
    record = made.metrics["search"]
    held = record["tournament"]
    assert [len(entry["divergence_nats"]) for entry in held["rounds"]] == [3, 2]
    assert record["winner"] == held["winner"] == next(iter(held["rounds"][-1]["divergence_nats"]))
    assert held["first_choice"] == record["measured"][0]["name"]
    assert held["first_choice"] in held["rounds"][0]["divergence_nats"]
    assert held["against_first_choice"]["verdict"] in {"better", "same", "worse"}
    assert all(0.0 <= entry["leader_share"] <= 1.0 for entry in held["rounds"])
    assert held["tokens_of_the_winner"] == 2 * 2 * 32 + 4 * 2 * 32
    untrained = made.path / "model.safetensors"
    assert untrained.is_file()
    assert not work_directory(made.path).exists()


def test_the_record_of_a_search_is_read_whole_by_the_report(contested, teacher):
    roles = {"teacher.model": teacher, "pruned.model": contested}
    report = make_report(ReportConfig(), roles)
    search = report.search
    assert search.missing == []
    assert search.winner == contested.metrics["search"]["winner"]
    assert len(search.measured) == 3
    assert len(search.tournament.rounds) == 2
    assert {point.kind for point in search.sensitivity} == {"ffn", "heads", "depth"}
    assert len(search_figures(search)) == 2
    assert len(search_tables.paragraphs(search)) == 2
    for text in (page(report), report_markdown(report)):
        assert "How the sizes were chosen" in text


def test_a_search_without_scores_says_how_to_make_them(config, teacher, tmp_path):
    with pytest.raises(ConfigError, match="3 axes without a size need scores") as error:
        prune(config, source=teacher, out=tmp_path / "pruned")
    assert "trt-kd score" in error.value.hint
    assert not list(tmp_path.iterdir())


def test_scores_of_another_model_are_refused(config, teacher, scores, found, tmp_path):
    with pytest.raises(ConfigError, match="another model"):
        prune(config, source=found, scores=scores, out=tmp_path / "pruned")


@pytest.mark.parametrize("changed", [{"calibration_tokens": 128}, {"seed": 1}])
def test_scores_made_on_other_text_are_refused(settings, changed, teacher, scores, tmp_path):
    config = PruneConfig.model_validate(settings | changed)
    with pytest.raises(ConfigError, match=f"made with {next(iter(changed))}"):
        prune(config, source=teacher, scores=scores, out=tmp_path / "pruned")


def test_limits_that_leave_no_candidate_are_refused(settings, teacher, scores, tmp_path):
    search = {"max_width_pruning": 0.01, "max_depth_pruning": 0.01}
    config = PruneConfig.model_validate(settings | {"search": search})
    with pytest.raises(ModelError, match="none of the"):
        prune(config, source=teacher, scores=scores, out=tmp_path / "pruned")


def test_an_axis_that_was_not_scored_is_named(settings, teacher, scores, tmp_path):
    config = PruneConfig.model_validate(settings | {"axes": ["kv_heads", "depth"]})
    with pytest.raises(ModelError, match=r"nothing of axis .*kv_heads"):
        prune(config, source=teacher, scores=scores, out=tmp_path / "pruned")


@pytest.mark.parametrize(
    "changes",
    [
        {"axes": [{"kind": "ffn", "size": 64}, "depth"]},
        {"axes": ["vocab", "depth"], "search": None},
        {"budget": None},
    ],
)
def test_a_search_without_a_choice_is_refused(settings, changes):
    with pytest.raises(ValueError, match=r"search has no effect|one vocabulary|has no size"):
        PruneConfig.model_validate(settings | changes)


@pytest.mark.parametrize(
    ("axes", "message"),
    [([{"kind": "ffn", "size": 64}], "leave out the sizes"), (["vocab"], "one vocabulary")],
)
def test_what_cannot_be_scored_is_refused(data, axes, message):
    with pytest.raises(ValueError, match=message):
        ScoreConfig.model_validate({"axes": axes, "data": data})


def test_a_measured_cut_survives_a_kill(config, teacher, scores, tmp_path, monkeypatch):
    from trt_kd.stages import score as module

    count = []
    real = module.prune_model

    def killed(*arguments):
        count.append(0)
        if len(count) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    small = scoring_of(config).model_copy(update={"cut_tokens": 128, "check_tokens": 128})
    monkeypatch.setattr(module, "prune_model", killed)
    with pytest.raises(KeyboardInterrupt):
        score(small, source=teacher, out=tmp_path / "scores")
    resumed = score(small, source=teacher, out=tmp_path / "scores")
    cuts = len(read_points(scores.path))
    assert len(count) == 3 + cuts - 2
    assert resumed.manifest.files == scores.manifest.files


def test_sizes_are_reached_in_rounds(settings, teacher, tmp_path):
    changes = {
        "axes": [{"kind": "ffn", "size": 32, "multiple_of": 16}, {"kind": "depth", "layers": 2}],
        "budget": None,
        "search": None,
        "rounds": 3,
    }
    config = PruneConfig.model_validate(settings | changes)
    made = prune(config, source=teacher, out=tmp_path / "pruned")
    shape = read_shape(made.path)
    assert (shape.ffn, shape.layers) == (32, 2)
    kept = made.metrics["kept_layers"]
    assert kept == sorted(set(kept))
    assert len(kept) == 2
    assert kept[0] == 0
    assert kept[-1] == 3


def test_the_record_is_plain_json(found):
    assert json.loads(json.dumps(found.metrics["search"])) == found.metrics["search"]


def test_every_error_is_one_of_ours():
    assert issubclass(ConfigError, TrtKdError)
