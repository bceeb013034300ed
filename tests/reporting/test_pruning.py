"""What was cut: from artifacts of the prune stage, complete, old and damaged, to tables."""

import json
import re
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

import pytest

from trt_kd.architectures.shape import shape_from_config
from trt_kd.artifacts import Artifact, writing
from trt_kd.config import StageConfig
from trt_kd.pruning.budget import memory_bytes
from trt_kd.pruning.catalogue import catalogue
from trt_kd.pruning.readings import STEPS
from trt_kd.reporting import pruning_tables
from trt_kd.reporting.collect import sort_inputs
from trt_kd.reporting.markdown import report_markdown
from trt_kd.reporting.page import page
from trt_kd.reporting.pruning import HEAD, PROJECTIONS, pruning_of
from trt_kd.reporting.pruning_figure import layer_figure

LAYERS = 4
BEFORE = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": LAYERS, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    "intermediate_size": 256, "tie_word_embeddings": True,
}  # fmt: skip
AFTER = {**BEFORE, "intermediate_size": 128, "num_attention_heads": 2}
SHALLOW = {**AFTER, "num_hidden_layers": 3}
AXES = [{"kind": "heads"}, {"kind": "ffn"}]


def refit(layer: int, projection: str, ridge: float | None = 0.01) -> dict[str, Any]:
    lost = (layer + LAYERS * (projection == "down_proj")) / 20
    return {"layer": layer, "projection": projection, "plain_residual": lost,
            "residual": lost / 2, "ridge": ridge}  # fmt: skip


METRICS: dict[str, Any] = {
    "parameters_before": shape_from_config(BEFORE).parameters,
    "block_influence": [0.9, 0.03, 0.02, 0.4],
    "refits": [refit(n, "o_proj", 0.01) for n in range(LAYERS)]
    + [refit(n, "down_proj", None) for n in range(LAYERS)],
    "calibration_tokens": 16_384,
    "importance_pass_s": 40.0,
}


class Made(StageConfig):
    stage: ClassVar[str] = "prune"
    note: str = ""
    axes: list[dict[str, Any]] | None = None
    reconstruct: dict[str, Any] | None = None


@pytest.fixture
def cut(tmp_path):
    """What was cut by these metrics, config and settings."""

    def make(metrics=METRICS, after=AFTER, rows=(), role="pruned", **settings):
        settings = {"axes": AXES, "reconstruct": {}} | settings
        inputs = {"teacher.model": write(tmp_path / "teacher", BEFORE, {})}
        inputs[f"{role}.model"] = write(tmp_path / "cut", after, metrics, **settings)
        return pruning_of(sort_inputs(inputs), rows)

    def write(out: Path, config: Any, metrics: Any, **settings: Any) -> Artifact:
        made = Made(note=out.name, **settings)
        with writing(out, kind="checkpoint", config=made, inputs={}) as draft:
            (draft.path / "config.json").write_text(json.dumps(config), encoding="utf-8")
            draft.metrics |= metrics
        return Artifact.open(out)

    return make


def test_parts_and_sizes_are_those_of_both_shapes(cut):
    found = cut()
    old, new = shape_from_config(BEFORE), shape_from_config(AFTER)
    assert sum(part.parameters_before for part in found.parts) == old.parameters
    assert sum(part.parameters_after for part in found.parts) == new.parameters
    assert {p.name: p.parameters_after for p in found.parts}.items() <= new.parts().items()
    sizes = {size.name: (size.before, size.after) for size in found.sizes}
    assert sizes["ffn"] == (256, 128)
    assert sizes["heads"] == (4, 2)
    assert sizes["layers"] == (4, 4)
    assert "experts" not in sizes


def test_refits_are_told_apart_by_their_names(cut):
    found = cut()
    assert found.missing == ["Nothing was timed: memory is predicted for 2,048 tokens."]
    for number, layer in enumerate(found.layers):
        output, down = layer.refits
        assert (output.projection, down.projection) == ("output", "down")
        assert output.plain_energy_lost == number / 20
        assert down.plain_energy_lost == (number + LAYERS) / 20
        assert down.refit_energy_lost == (number + LAYERS) / 40
        assert (output.ridge, down.ridge) == (0.01, "plain cut")


def test_refits_of_some_layers_stand_at_theirs(cut):
    """As after a drop: kept layers were refit, one of them to make up for what is gone."""
    refits = [refit(0, "o_proj"), refit(3, "o_proj"), refit(1, "down_proj", None)]
    found = cut(METRICS | {"refits": refits, "kept_layers": [0, 1, 3]}, SHALLOW)
    kinds = [[each.projection for each in layer.refits] for layer in found.layers]
    assert kinds == [["output"], ["down"], [], ["output"]]
    rows = pruning_tables.layers(found).rows
    assert [row.cells[-1].value for row in rows].count("plain cut") == 1
    assert layer_figure(found) is not None


def test_every_projection_that_can_be_refit_has_its_columns_and_its_mark(cut, make_report):
    names = [*STEPS[:3], "router", "experts.0.down_proj", "experts.1.down_proj", "down_proj"]
    refits = [refit(n, name, 0.1) for n in range(LAYERS) for name in names]
    refits.append({**refit(0, "lm_head"), "layer": None})
    found = cut(METRICS | {"refits": refits})
    assert found.missing == ["Nothing was timed: memory is predicted for 2,048 tokens."]
    kinds = ["attention", "output", "mlp", "router", "experts", "down"]
    for layer in found.layers:
        assert [each.projection for each in layer.refits] == kinds
    assert set(STEPS) - PROJECTIONS.keys() == {HEAD}
    assert layer_figure(found) is not None
    for text in (page(make_report(pruning=found)), report_markdown(make_report(pruning=found))):
        assert "Queries, keys and values" in text


def test_experts_of_a_layer_stand_as_one_with_their_mean(cut):
    refits = [refit(2, f"experts.{n}.down_proj", ridge) for n, ridge in enumerate((0.1, None))]
    refits[1]["plain_residual"] = 0.3
    (merged,) = cut(METRICS | {"refits": refits}).layers[2].refits
    assert merged.plain_energy_lost == pytest.approx((0.1 + 0.3) / 2)
    assert merged.ridge is None


def test_dropped_layers_are_marked_by_their_numbers_before_the_cut(cut):
    found = cut({**METRICS, "kept_layers": [0, 1, 3]}, SHALLOW)
    assert [layer.kept for layer in found.layers] == [True, True, False, True]
    drawing = layer_figure(found)
    assert "Dropped layers, crossed and hatched: 2." in drawing.text
    assert pruning_tables.layers(found).rows[2].cells[0].value == "dropped"


@pytest.mark.parametrize("name", [*METRICS, "kept_layers"])
def test_an_older_artifact_without_a_metric_still_makes_a_section(cut, make_report, name):
    metrics = METRICS | {"kept_layers": [0, 1, 3]}
    found = cut({key: value for key, value in metrics.items() if key != name}, SHALLOW)
    told = " ".join(found.missing)
    if name in ("block_influence", "kept_layers", "refits"):
        assert "not recorded" in told
    report = make_report(pruning=found)
    for text in (page(report), report_markdown(report)):
        assert all(sentence in text for sentence in found.missing)


def test_without_any_metric_the_shapes_alone_are_told(cut, make_report):
    found = cut({}, AFTER)
    assert found.layers == []
    assert layer_figure(found) is None
    assert len(found.missing) == 3
    report = make_report(pruning=found)
    assert "Parameters by part" in page(report)
    assert "### Layers" not in report_markdown(report)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("block_influence", [0.1] * 3),
        ("block_influence", "high"),
    ],
)
def test_a_metric_that_does_not_fit_the_shape_is_left_out_and_named(cut, name, value):
    found = cut(METRICS | {name: value})
    assert any(f"{name} is not a list of" in sentence for sentence in found.missing)
    assert len(found.layers) == LAYERS


@pytest.mark.parametrize(
    "value",
    [
        "none",
        [0.1] * LAYERS,
        [refit(LAYERS, "o_proj")],
        [refit(-1, "o_proj")],
        [refit(0, "q_proj")],
        [refit(0, "o_proj") | {"residual": None}],
        [refit(0, "o_proj") | {"ridge": "strong"}],
        [{"layer": 0, "projection": "o_proj"}],
    ],
)
def test_a_damaged_record_of_refits_is_left_out_and_named(cut, value):
    found = cut(METRICS | {"refits": value})
    assert "an entry of refits is not one of this model" in found.missing[-1]
    assert not any(layer.refits for layer in found.layers)
    assert len(found.layers) == LAYERS


def test_a_cut_of_another_model_than_the_teacher_shows_no_layers(cut):
    found = cut(METRICS | {"parameters_before": 1000})
    assert found.layers == []
    assert "a model of 1,000 parameters, not of the teacher" in found.missing[-1]


def test_a_plain_cut_says_that_nothing_was_refit(cut):
    plain = {name: value for name, value in METRICS.items() if name != "refits"}
    found = cut(plain, reconstruct=None)
    assert "No projection was refit: reconstruct was off." in found.missing
    assert not any(layer.refits for layer in found.layers)


def test_memory_is_what_the_budget_says_for_every_timed_workload(cut, variant):
    found = cut(rows=[variant("teacher"), variant("student")])
    shapes = {"teacher": shape_from_config(BEFORE), found.after: shape_from_config(AFTER)}
    assert len(found.memory) == 2 * 2 * len(catalogue().formats)
    for row in found.memory:
        assert (row.tokens, row.batch_size in (1, 8)) == (160, True)
        parts = memory_bytes(
            shapes[row.role], weight_format=row.weight_format, kv_format=row.kv_format,
            batch=row.batch_size, tokens=row.tokens,
        )  # fmt: skip
        assert row.kv_cache_bytes == parts.pop("kv_cache")
        assert row.weights_bytes == sum(parts.values())
        assert (row.kv_format == "fp32") == (row.weight_format in ("fp32", "int4_block32"))


def test_every_format_stands_in_the_table_once(cut, make_report):
    table = pruning_tables.memory(make_report(), cut())
    named = [name for row in table.rows for name in row.name.split(", ")]
    assert sorted(named) == sorted(catalogue().formats)
    assert all(len(row.cells) == len(table.columns) for row in table.rows)
    assert sum(count for _, count in table.groups) == len(table.columns)


def test_columns_of_equal_names_are_told_apart_in_markdown(cut, make_report):
    text = report_markdown(make_report(pruning=cut()))
    for line in text.splitlines():
        if line.startswith("|") and "--:" not in line:
            heads = line.split("|")[1:-1]
            if line.startswith(("| Part", "| Weight format", "| Number")):
                assert len(set(heads)) == len(heads), line
    assert "teacher: Parameters (M)" in text


def test_shares_add_up_to_the_whole(cut, make_report):
    table = pruning_tables.parts(make_report(), cut())
    for column in (1, 3):
        shares = [float(row.cells[column].value) for row in table.rows]
        assert shares[-1] == 100.0
        assert sum(shares[:-1]) == pytest.approx(100.0, abs=0.3)


def test_the_student_stands_for_itself_where_it_was_only_pruned(cut):
    assert cut(role="student").after == "student"


def test_no_section_without_a_teacher_or_without_a_cut(make_report, tmp_path):
    assert pruning_of(sort_inputs({}), []) is None
    report = make_report()
    assert report.pruning is None
    assert "What was cut" not in page(report) + report_markdown(report)


def test_the_figure_is_themed_well_formed_and_tells_kinds_apart_without_colour(cut):
    found = cut({**METRICS, "kept_layers": [0, 1, 3]}, SHALLOW)
    drawing = layer_figure(found)
    assert drawing == layer_figure(found)
    assert ElementTree.fromstring(drawing.svg).get("aria-label") == drawing.title
    assert "currentColor" in drawing.svg
    assert "#010203" not in drawing.svg
    assert "http" not in drawing.svg
    for words in ("down: plain cut", "output: after the refit", "block influence (log scale)"):
        assert words in drawing.svg
    assert "output projection and of the down projection" in drawing.text
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', drawing.svg))
    assert used <= set(re.findall(r'\sid="([^"]+)"', drawing.svg))


def test_scores_of_zero_are_drawn_on_a_plain_scale(cut):
    zero = cut(METRICS | {"block_influence": [0.0] * LAYERS})
    assert "log scale" not in layer_figure(zero).svg


def test_refits_are_drawn_without_scores_too(cut):
    alone = cut({name: value for name, value in METRICS.items() if name != "block_influence"})
    drawing = layer_figure(alone)
    assert "output energy lost (%)" in drawing.svg
    assert "influence" not in drawing.svg + drawing.text
