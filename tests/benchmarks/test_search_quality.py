"""The script cuts every single axis that can reach a share, and records what it measured."""

import json
from types import SimpleNamespace

import pytest

from trt_kd.architectures.shape import shape_from_config
from trt_kd.stages.prune import PruneConfig

TEACHER = {
    "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "head_dim": 64,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49_152,
    "intermediate_size": 1536, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("search_quality")


def searching(share, axes):
    limits = {"max_width_pruning": 0.5, "max_depth_pruning": 0.34}
    settings = {"axes": axes, "budget": {"params": share}, "search": limits}
    return PruneConfig.model_validate({**settings, "reconstruct": {"schedule": "sequential"}})


@pytest.mark.parametrize("share", [0.803, 0.70])
def test_every_axis_that_can_reach_the_share_is_cut_alone(script, share):
    shape, config = shape_from_config(TEACHER), searching(share, script.AXES)
    alone = script.single_axes(config, shape)
    assert list(alone) == ["ffn", "depth", "hidden"]  # attention is too small a part
    for each in alone.values():
        left = each.planned(shape).parameters / shape.parameters
        assert share - 0.05 < left <= share
    schedules = {kind: each.reconstruct.schedule for kind, each in alone.items()}
    assert schedules == {"ffn": "sequential", "depth": "sequential", "hidden": "once"}


def test_an_axis_beyond_the_searchs_own_limits_says_so(script):
    shape = shape_from_config(TEACHER)
    found = {}
    for share in (0.803, 0.70):
        config = searching(share, script.AXES)
        for kind, alone in script.single_axes(config, shape).items():
            found[kind, share] = script.beyond_limits(alone, config, shape)
    beyond = {key for key, value in found.items() if value}
    assert beyond == {("ffn", 0.70), ("depth", 0.70)}
    ffn = script.single_axes(searching(0.70, script.AXES), shape)["ffn"]
    assert ffn.planned(shape).ffn == 704


def test_the_last_line_is_the_record_of_all_cuts(script, monkeypatch, tmp_path, capsys):
    made = []
    shape = shape_from_config(TEACHER)

    def make(out, config, stage, **inputs):
        made.append((out.name, sorted(inputs)))
        metrics = {"sensitivity": [], "kept_sizes": {"num_layers": 30}, "parameters_share": 0.8}
        return SimpleNamespace(path=out, metrics=metrics, key=out.name)

    monkeypatch.setattr(script, "made", make)
    monkeypatch.setattr(script, "perplexity", lambda artifact, blocks: 2.0)
    monkeypatch.setattr(script, "read_shape", lambda path: shape)
    assert script.main(["--work", str(tmp_path), "--shares", "0.70"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    record = json.loads(last)
    assert record["ratio_at"] == {"0.70": 1.0}
    assert record["single_axis"] == {"0.70": dict.fromkeys(["ffn", "depth", "hidden"], 1.0)}
    assert record["without_reconstruction"] == {"0.70": 1.0}
    flags = {name: cut["beyond_limits"] for name, cut in record["cuts"].items()}
    assert flags == {
        "searched-0.70": False,
        "ffn-0.70": True,
        "depth-0.70": True,
        "hidden-0.70": False,
        "plain-0.70": False,
    }
    inputs = dict(made)
    assert inputs["ffn-0.70"] == inputs["plain-0.70"] == ["scores", "source"]
    assert inputs["hidden-0.70"] == ["source"]
    assert len({line.count("|") for line in table if line.startswith("|")}) == 1
