"""Limits on time: the table is measured, predictions rank, and the runtime has the last word."""

import json

import pytest

from trt_kd.architectures.shape import read_shape
from trt_kd.artifacts import Artifact, writing
from trt_kd.artifacts.environment import environment
from trt_kd.checkpoints import save_model
from trt_kd.cli.candidates import dry_run
from trt_kd.config import StageConfig
from trt_kd.errors import ConfigError, ModelError
from trt_kd.latency.operators import METRICS, amounts
from trt_kd.latency.table import Cell, Lane, LatencyTable, Row, read_table
from trt_kd.pruning.budget import Budget
from trt_kd.pruning.candidates import SearchSpace
from trt_kd.pruning.search import Search
from trt_kd.pruning.sensitivity import Point
from trt_kd.stages import confirming
from trt_kd.stages.confirming import chosen_lane, corners
from trt_kd.stages.latency import LatencyConfig, Timing, latency
from trt_kd.stages.prune import PruneConfig, prune
from trt_kd.stages.score import score, scoring_of
from trt_kd.stages.twins import SOURCE, Stand


class LoneConfig(StageConfig):
    """Settings of an artifact that no stage made."""

    stage = "import"


AXES = [{"kind": "ffn", "multiple_of": 8}, "depth"]
TRUE = {
    "step": 1.0,
    "layer": 0.5,
    "attention": 1e-5,
    "mlp": 1e-4,
    "head": 0.0,
    "context": 0.0,
    "router": 1e-4,
    "experts": 1e-3,
    "routed": 1e-4,
}
INPUT_TOKENS = 8


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, tokenizer_dir):
    """A tiny Mixtral of four experts, two for a token."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    settings = MixtralConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
    )
    out = tmp_path_factory.mktemp("mixture") / "teacher"
    with writing(out, kind="checkpoint", config=LoneConfig(), inputs={}) as draft:
        save_model(MixtralForCausalLM(settings).eval(), draft.path, tokenizer_from=tokenizer_dir)
    return Artifact.open(out, expect="checkpoint")


@pytest.fixture(scope="module")
def settings(data):
    return {
        "axes": AXES,
        "lanes": {"plain": "onnx"},
        "batch_sizes": (1, 2),
        "input_tokens": INPUT_TOKENS,
        "output_tokens": 3,
        "probes": 4,
        "together": 2,
        "warmup": 0,
        "repeats": 1,
        "data": data,
    }


@pytest.fixture(scope="module")
def config(settings):
    return LatencyConfig.model_validate(settings)


@pytest.fixture(scope="module")
def table(settings, teacher, tmp_path_factory):
    config = LatencyConfig.model_validate(settings | {"probes": 3, "together": 3})
    return latency(config, source=teacher, out=tmp_path_factory.mktemp("latency") / "table")


def cells(shape, batch_sizes, factor=1.0):
    """Times of a machine for which the model holds exactly."""
    found = []
    for batch in batch_sizes:
        times = {}
        for metric in METRICS:
            tokens = batch * (INPUT_TOKENS if metric == "ttft_ms" else 1)
            units = amounts(shape, metric, tokens)
            ms = factor * batch * sum(TRUE[name] * units[name] for name in units)
            times[metric] = {"p50": ms, "p90": ms, "p99": ms}
        found.append(Cell(batch_size=batch, spread=0.0, **times))
    return found


def written(out, config, teacher, *, kl_nats=None):
    """A table of that machine, one lane for each of ``kl_nats``, the latter ones faster."""
    shape = read_shape(teacher.path)
    lanes = {}
    for number, (name, nats) in enumerate((kl_nats or {"plain": 0.0}).items()):
        rows = [
            Row(sizes=one.changes(shape), cells=cells(one, config.batch_sizes, 0.5**number))
            for one in [shape, *config.shapes(shape)]
        ]
        lane = config.lanes["plain"]
        settings = lane.model_dump(mode="json")
        lanes[name] = Lane(lane=settings, backend=lane.backend, kl_nats=nats, rows=rows)
    made = LatencyTable(
        hardware=environment(),
        source=vars(shape),
        input_tokens=INPUT_TOKENS,
        output_tokens=3,
        lanes=lanes,
    )
    with writing(out, kind="latency", config=config, inputs={"source": teacher}) as draft:
        made.save(draft.path)
    return Artifact.open(out, expect="latency")


@pytest.fixture
def exact(config, teacher, tmp_path):
    return written(tmp_path / "exact", config, teacher)


@pytest.fixture
def runtime(monkeypatch):
    """Stands in for timing: the machine of the table, candidates ``slower`` times slower."""

    class Runtime:
        slower = 1.0
        timed: list = []

        def time(self, stand, shapes, benchmark, work):
            self.timed.append(sorted(shapes))
            shape = read_shape(stand.source.path)
            found = {SOURCE: cells(shape, benchmark.batch_sizes)}
            for name, made in shapes.items():
                found[name] = cells(made, benchmark.batch_sizes, self.slower)
            return found

    made = Runtime()
    made.timed = []
    monkeypatch.setattr(
        Stand, "time", lambda stand, shapes, config, work: made.time(stand, shapes, config, work)
    )
    monkeypatch.setattr(confirming, "untested_export", lambda lane, source, out: source)
    return made


# --- the table ----------------------------------------------------------------------------------


def test_every_lane_holds_the_unpruned_model_and_every_probe(table):
    lane = read_table(table.path).lanes["plain"]
    assert lane.rows[0].sizes == {}
    assert len(lane.rows) == 1 + 3
    assert all([cell.batch_size for cell in row.cells] == [1, 2] for row in lane.rows)
    assert lane.kl_nats == pytest.approx(0, abs=1e-6)
    told = table.metrics["lanes"]["plain"]
    assert {(one["metric"], one["batch_size"]) for one in told} == {
        (metric, batch) for metric in METRICS for batch in (1, 2)
    }


def test_probes_leave_nothing_behind(table):
    assert sorted(path.name for path in table.path.iterdir()) == ["latency.json", "trt_kd.json"]


def test_every_axis_is_measured_at_its_smallest_and_all_of_them_together(config, teacher):
    shape = read_shape(teacher.path)
    sizes = [one.changes(shape) for one in config.shapes(shape)]
    assert sizes[:3] == [{"ffn": 64}, {"layers": 3}, {"ffn": 64, "layers": 3}]


def test_a_group_that_was_timed_is_not_timed_again(config, teacher, tmp_path, monkeypatch):
    groups = []

    def time(stand, shapes, benchmark, work):
        groups.append(sorted(shapes))
        if len(groups) == 2:
            raise KeyboardInterrupt
        shape = read_shape(teacher.path)
        return {name: cells(shape, benchmark.batch_sizes) for name in [SOURCE, *shapes]}

    monkeypatch.setattr(Stand, "time", time)
    with pytest.raises(KeyboardInterrupt):
        latency(config, source=teacher, out=tmp_path / "table")
    latency(config, source=teacher, out=tmp_path / "table")
    assert groups == [["probe-0", "probe-1"], ["probe-2", "probe-3"], ["probe-2", "probe-3"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axes": [{"kind": "ffn", "size": 64}]}, "leave out the sizes"),
        ({"axes": ["vocab"]}, "leave out vocab"),
        ({"lanes": {"engine": "trtllm-engine"}}, "trtllm-engine is not run here"),
        ({"probes": 2}, "greater than or equal to 3"),
    ],
)
def test_settings_that_cannot_be_timed_are_refused(settings, change, message):
    with pytest.raises(ValueError, match=message):
        LatencyConfig.model_validate(settings | change)


def test_too_few_sizes_are_refused_before_anything_is_timed(settings, teacher, tmp_path):
    config = LatencyConfig.model_validate(settings | {"axes": ["depth"], "max_depth_pruning": 0.3})
    with pytest.raises(ModelError, match="too few to time"):
        latency(config, source=teacher, out=tmp_path / "table")
    assert not list(tmp_path.iterdir())


def test_a_damaged_table_is_named(tmp_path):
    (tmp_path / "latency.json").write_text(json.dumps({"schema_version": 1}), encoding="utf-8")
    with pytest.raises(Exception, match="is no latency table: hardware: Field required"):
        read_table(tmp_path)


def test_along_gives_the_axes_and_keeps_the_rest(settings, config):
    timing = Timing.model_validate({key: settings[key] for key in settings if key != "axes"})
    assert timing.along(config.axes) == config


# --- one open axis ------------------------------------------------------------------------------


def one_axis(data, **limit):
    return PruneConfig.model_validate(
        {
            "axes": [{"kind": "ffn", "multiple_of": 8}],
            "budget": {"latency": {"batch": 2} | limit},
            "calibration_tokens": 64,
            "data": data,
        }
    )


def test_the_largest_size_that_is_fast_enough_is_kept(data, teacher, exact, runtime, tmp_path):
    config = one_axis(data, itl_ms="85%")
    made = prune(config, source=teacher, latency=exact, out=tmp_path / "pruned")
    kept, shape = read_shape(made.path), read_shape(teacher.path)
    before = cells(shape, [2])[0].itl_ms["p50"]
    assert cells(kept, [2])[0].itl_ms["p50"] <= 0.85 * before
    larger = kept.with_sizes(ffn=kept.ffn + 8)
    assert cells(larger, [2])[0].itl_ms["p50"] > 0.85 * before
    record = made.metrics["latency"]
    assert record["lane"] == "plain"
    assert record["tried"][0]["verdict"] == "kept"
    assert record["corners"][0]["name"] == "unpruned"


def test_experts_are_cut_to_what_is_fast_enough(data, settings, mixture, runtime, tmp_path):
    axis = {"kind": "expert_ffn", "multiple_of": 8}
    change = {"axes": ["experts", axis]}
    table = LatencyConfig.model_validate(settings | change | {"lanes": {"plain": "hf-unified"}})
    exact = written(tmp_path / "exact", table, mixture)
    limit = {"latency": {"batch": 2, "ttft_ms": "95%"}}
    config = PruneConfig.model_validate(
        {"axes": [axis], "budget": limit, "calibration_tokens": 64, "data": data}
    )
    made = prune(config, source=mixture, latency=exact, out=tmp_path / "pruned")
    kept, shape = read_shape(made.path), read_shape(mixture.path)
    before, after = (cells(one, [2])[0].ttft_ms["p50"] for one in (shape, kept))
    assert after <= 0.95 * before
    assert made.metrics["latency"]["tried"][0]["verdict"] == "kept"


def test_what_misses_the_limit_when_measured_is_dropped(data, teacher, exact, runtime, tmp_path):
    runtime.slower = 1.1
    made = prune(
        one_axis(data, itl_ms="85%"), source=teacher, latency=exact, out=tmp_path / "pruned"
    )
    tried = made.metrics["latency"]["tried"]
    assert [row["verdict"] for row in tried] == ["over the limit", "kept"]
    assert tried[0]["over_predicted"]["itl_ms"] == pytest.approx(1.1)
    assert tried[1]["measured"]["itl_ms"] <= tried[1]["limits"]["itl_ms"]


def test_what_gains_too_little_is_dropped(data, teacher, exact, runtime, tmp_path):
    config = one_axis(data, itl_ms="99.9%", min_speedup=2)
    with pytest.raises(ModelError, match="less than 2 times faster"):
        prune(config, source=teacher, latency=exact, out=tmp_path / "pruned")


def test_a_runtime_that_never_keeps_the_limit_ends_the_search(
    data, teacher, exact, runtime, tmp_path
):
    runtime.slower = 3.0
    with pytest.raises(ModelError, match="no candidate keeps the limits on the runtime"):
        prune(one_axis(data, itl_ms="85%"), source=teacher, latency=exact, out=tmp_path / "p")


def test_candidates_are_timed_on_the_real_runtime(data, teacher, table, tmp_path):
    config = one_axis(data, itl_ms="1000%", batch=1, min_speedup=0.01)
    budget = config.budget.model_copy(update={"params": 0.9})
    out = tmp_path / "pruned"
    made = prune(
        config.model_copy(update={"budget": budget}), source=teacher, latency=table, out=out
    )
    (row,) = made.metrics["latency"]["tried"]
    assert row["verdict"] == "kept"
    assert 0 < row["measured"]["itl_ms"] < 10 * row["before"]["itl_ms"]
    assert read_shape(out).parameters <= 0.9 * read_shape(teacher.path).parameters


@pytest.mark.parametrize("limit", [{"ttft_ms": "85%"}, {"tokens_per_s": "120%"}])
def test_every_kind_of_limit_holds(data, teacher, exact, runtime, tmp_path, limit):
    made = prune(one_axis(data, **limit), source=teacher, latency=exact, out=tmp_path / "pruned")
    row = made.metrics["latency"]["tried"][-1]
    (name,) = row["limits"]
    assert row["measured"][name] <= row["limits"][name] < row["before"][name]


def test_limits_without_a_table_and_a_table_without_limits_are_refused(
    data, teacher, exact, tmp_path
):
    config = one_axis(data, itl_ms="85%")
    with pytest.raises(ConfigError, match=r"budget\.latency needs measured times"):
        prune(config, source=teacher, out=tmp_path / "pruned")
    plain = config.model_copy(update={"budget": Budget(params=0.9)})
    with pytest.raises(ConfigError, match="no effect without limits on time"):
        prune(plain, source=teacher, latency=exact, out=tmp_path / "pruned")


def test_a_table_of_another_model_is_refused(data, config, teacher, tmp_path):
    with writing(tmp_path / "other", kind="checkpoint", config=config, inputs={}) as draft:
        for path in teacher.path.iterdir():
            if path.name != "trt_kd.json":
                (draft.path / path.name).write_bytes(path.read_bytes())
    other = written(tmp_path / "table", config, Artifact.open(tmp_path / "other"))
    with pytest.raises(ConfigError, match="is of another model than"):
        prune(one_axis(data, itl_ms="85%"), source=teacher, latency=other, out=tmp_path / "p")


# --- lanes --------------------------------------------------------------------------------------

POINTS = [Point("ffn", 64, 128, 0.4), Point("depth", 3, 4, 0.6)]


def found_corners(place, config, teacher, limit, kl_nats):
    made = written(place, config, teacher, kl_nats=kl_nats)
    return corners(
        Budget(latency=limit),
        read_table(made.path),
        config.axes,
        PruneConfig(axes=AXES, budget=Budget(params=0.5)).target,
        points=POINTS,
        search=Search(max_width_pruning=0.6, max_depth_pruning=0.5),
    )


def test_unpruned_lanes_come_first_and_pruned_ones_only_where_they_are_needed(
    config, teacher, tmp_path
):
    limit = {"itl_ms": "80%", "batch": 2}
    found = found_corners(tmp_path / "t", config, teacher, limit, {"plain": 0.0, "quick": 0.1})
    # A share counts from the same lane's own time, so both have to prune.
    assert [(one.lane, one.name == "unpruned") for one in found] == [
        ("plain", True),
        ("quick", True),
        ("plain", False),
        ("quick", False),
    ]
    assert chosen_lane(found) == "plain"


def test_a_format_that_is_fast_enough_by_itself_ends_the_pruning(config, teacher, tmp_path):
    ms = cells(read_shape(teacher.path), [2])[0].itl_ms["p50"]
    limit = {"itl_ms": 0.75 * ms, "batch": 2}
    found = found_corners(tmp_path / "t", config, teacher, limit, {"plain": 0.0, "quick": 0.05})
    with pytest.raises(ModelError, match="fits the budget unpruned in the lane quick"):
        chosen_lane(found)


@pytest.mark.parametrize("slower", [0.9, 1.0, 1.2])
@pytest.mark.parametrize("limit_share", [0.95, 1.1, 1.3])
def test_the_unpruned_model_fits_by_what_it_measured(
    config, teacher, tmp_path, slower, limit_share
):
    """Its prediction may say otherwise: the cost that is shown is the one that is judged."""
    ms = cells(read_shape(teacher.path), [2])[0].itl_ms["p50"]
    table = read_table(written(tmp_path / "t", config, teacher, kl_nats={"plain": 0.0}).path)
    first, *probes = table.lanes["plain"].rows
    scaled = [
        cell.model_copy(update={"itl_ms": {p: slower * v for p, v in cell.itl_ms.items()}})
        for cell in first.cells
    ]
    rows = [first.model_copy(update={"cells": scaled}), *probes]
    lane = table.lanes["plain"].model_copy(update={"rows": rows})
    changed = table.model_copy(update={"lanes": {"plain": lane}})
    limit = {"itl_ms": limit_share * ms, "batch": 2}
    target = PruneConfig(axes=AXES, budget=Budget(params=0.5)).target
    search = Search(max_width_pruning=0.6, max_depth_pruning=0.5)
    found = corners(
        Budget(latency=limit), changed, config.axes, target, points=POINTS, search=search
    )
    assert found[0].costs["itl_ms"] == pytest.approx(slower * ms)
    assert found[0].fits is (slower <= limit_share)
    assert (len(found) == 1) is found[0].fits
    for one in found[1:]:
        assert one.costs["itl_ms"] <= limit["itl_ms"]


def test_pruning_pays_where_the_fast_format_costs_more(config, teacher, tmp_path):
    ms = cells(read_shape(teacher.path), [2])[0].itl_ms["p50"]
    limit = {"itl_ms": 0.97 * ms, "batch": 2}
    found = found_corners(tmp_path / "t", config, teacher, limit, {"plain": 0.0, "quick": 2.0})
    assert chosen_lane(found) == "plain"


# --- a search -----------------------------------------------------------------------------------


def test_a_search_measures_only_what_keeps_the_limit(data, teacher, exact, runtime, tmp_path):
    runtime.slower = 1.15
    config = PruneConfig.model_validate(
        {
            "axes": AXES,
            "budget": {"latency": {"itl_ms": "80%", "batch": 2}},
            "calibration_tokens": 64,
            "search": {
                "top_k": 2,
                "max_width_pruning": 0.6,
                "max_depth_pruning": 0.5,
                "check_tokens": 64,
            },
            "data": data,
        }
    )
    small = scoring_of(config).model_copy(update={"cut_tokens": 64, "check_tokens": 64})
    scores = score(small, source=teacher, out=tmp_path / "scores")
    made = prune(config, source=teacher, scores=scores, latency=exact, out=tmp_path / "pruned")
    search = made.metrics["search"]
    kept = {row["name"] for row in search["latency"]["tried"] if row["verdict"] == "kept"}
    assert {row["name"] for row in search["measured"]} <= kept
    assert search["winner"] in kept
    assert any(row["verdict"] == "over the limit" for row in search["latency"]["tried"])


# --- the dry run --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "said"), [("80%", "at most"), ("110%", "there is nothing to prune for")]
)
def test_a_dry_run_shows_the_lanes_first(config, teacher, exact, capsys, limit, said):
    space = SearchSpace(axes=AXES, budget={"latency": {"itl_ms": limit, "batch": 2}})
    dry_run(space, teacher.path, table=exact.path)
    lanes, _, rest = capsys.readouterr().out.partition("\n\n")
    assert "plain  unpruned" in lanes
    assert said in rest


def test_a_dry_run_tells_programs_everything(config, teacher, exact, capsys):
    space = SearchSpace(axes=AXES, budget={"latency": {"itl_ms": "80%", "batch": 2}})
    dry_run(space, teacher.path, table=exact.path, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert [one["name"] == "unpruned" for one in told["corners"]] == [True, False]
    assert all(one["costs"]["itl_ms"] <= told["limits"]["itl_ms"] for one in told["candidates"])
