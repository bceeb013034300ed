"""Limits on time: the table is measured, predictions rank, and the runtime has the last word."""

import json
from dataclasses import replace

import pytest
from pydantic import ValidationError

from trt_kd.architectures.shape import read_shape
from trt_kd.artifacts import Artifact, writing
from trt_kd.artifacts.environment import environment
from trt_kd.checkpoints import save_model
from trt_kd.cli.candidates import dry_run, ranking
from trt_kd.config import StageConfig
from trt_kd.errors import ArtifactError, ConfigError, ModelError
from trt_kd.latency.operators import METRICS, amounts
from trt_kd.latency.table import Cell, Lane, LatencyTable, Row, read_table
from trt_kd.pruning.budget import Budget
from trt_kd.pruning.candidates import SearchSpace, possible
from trt_kd.pruning.latency_limit import LatencyLimit, at_most, stopwatch
from trt_kd.pruning.search import Search, ranked
from trt_kd.pruning.sensitivity import Point, read_points, write_points
from trt_kd.stages import confirming
from trt_kd.stages import corners as ways
from trt_kd.stages.benchmark import several
from trt_kd.stages.corners import (
    LOOSER,
    PruningDoesNotPayError,
    choose_corner,
    corners,
    limits_of,
)
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
def shallow(make_student):
    """A model of two layers: what is timed on the real runtime is captured anew for every size."""
    return make_student(noise=0.0, num_hidden_layers=2)


@pytest.fixture(scope="module")
def table(settings, shallow, forking, tmp_path_factory):
    few = {"probes": 3, "together": 3, "max_depth_pruning": 0.5}
    config = LatencyConfig.model_validate(settings | few | {"input_tokens": (INPUT_TOKENS, 12)})
    with forking():
        return latency(config, source=shallow, out=tmp_path_factory.mktemp("latency") / "table")


def cells(shape, batch_sizes, factor=1.0, input_tokens=INPUT_TOKENS, gain=1.0):
    """Times of a machine for which the model holds exactly, longer for longer prompts.

    More than one sequence takes ``gain`` times as long as so many one after the other.
    """
    found = []
    for batch in batch_sizes:
        times = {}
        for metric in METRICS:
            tokens = batch * (input_tokens if metric == "ttft_ms" else 1)
            units = amounts(shape, metric, tokens)
            ms = factor * batch * sum(TRUE[name] * units[name] for name in units)
            ms *= input_tokens / INPUT_TOKENS * (gain if batch > 1 else 1.0)
            times[metric] = {"p50": ms, "p90": ms, "p99": ms}
        lengths = {"input_tokens": input_tokens, "output_tokens": 3}
        found.append(Cell(batch_size=batch, spread=0.0, **lengths, **times))
    return found


def cells_at(shape, config, factor=1.0, gain=1.0):
    """The same at every length of ``config``."""
    return [
        cell
        for tokens in several(config.input_tokens)
        for cell in cells(shape, config.batch_sizes, factor, tokens, gain)
    ]


def written(out, config, teacher, *, kl_nats=None, gain=1.0):
    """A table of that machine, one lane for each of ``kl_nats``, the latter ones faster."""
    shape = read_shape(teacher.path)
    lanes = {}
    for number, (name, nats) in enumerate((kl_nats or {"plain": 0.0}).items()):
        rows = [
            Row(sizes=one.changes(shape), cells=cells_at(one, config, 0.5**number, gain))
            for one in [shape, *config.shapes(shape)]
        ]
        lane = config.lanes["plain"]
        settings = lane.model_dump(mode="json")
        lanes[name] = Lane(lane=settings, backend=lane.backend, kl_nats=nats, rows=rows)
    made = LatencyTable(
        hardware=environment(),
        source=vars(shape),
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
        gain = 1.0
        timed: list = []
        workloads: tuple = ()

        def time(self, stand, shapes, benchmark, work):
            self.timed.append(sorted(shapes))
            shape = read_shape(stand.source.path)
            self.workloads = benchmark.rounds.workloads
            found = {SOURCE: cells_at(shape, benchmark, gain=self.gain)}
            for name, made in shapes.items():
                found[name] = cells_at(made, benchmark, self.slower, self.gain)
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
    workloads = [(INPUT_TOKENS, 1), (INPUT_TOKENS, 2), (12, 1), (12, 2)]
    for row in lane.rows:
        assert [(cell.input_tokens, cell.batch_size) for cell in row.cells] == workloads
    assert lane.kl_nats == pytest.approx(0, abs=1e-6)
    told = table.metrics["lanes"]["plain"]
    assert {(one["input_tokens"], one["metric"], one["batch_size"]) for one in told} == {
        (tokens, metric, batch) for metric in METRICS for tokens, batch in workloads
    }


def test_probes_leave_nothing_behind(table):
    assert sorted(path.name for path in table.path.iterdir()) == ["latency.json", "trt_kd.json"]


def test_every_axis_is_measured_at_its_smallest_and_all_of_them_together(config, teacher):
    shape = read_shape(teacher.path)
    sizes = [one.changes(shape) for one in config.shapes(shape)]
    assert sizes[:3] == [{"ffn": 64}, {"layers": 3}, {"ffn": 64, "layers": 3}]


def test_a_group_that_was_timed_is_not_timed_again(settings, teacher, tmp_path, monkeypatch):
    config = LatencyConfig.model_validate(settings | {"lanes": {"plain": "hf-unified"}})
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
        ({"input_tokens": (8, 8)}, "one of 8, 8 stands twice"),
        ({"batch_sizes": (1, 4, 1)}, "one of 1, 4, 1 stands twice"),
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
    with pytest.raises(ArtifactError, match="is no latency table: hardware: Field required"):
        read_table(tmp_path)
    (tmp_path / "latency.json").write_text('{"schema_version": 1', encoding="utf-8")
    with pytest.raises(ArtifactError, match="is no latency table"):
        read_table(tmp_path)


def test_a_table_from_before_there_were_several_lengths_is_read(exact, tmp_path):
    table = read_table(exact.path)
    content = table.model_dump(mode="json") | {"schema_version": 1}
    content |= {"input_tokens": INPUT_TOKENS, "output_tokens": 3}
    for lane in content["lanes"].values():
        for row in lane["rows"]:
            for cell in row["cells"]:
                del cell["input_tokens"], cell["output_tokens"]
    (tmp_path / "latency.json").write_text(json.dumps(content), encoding="utf-8")
    assert read_table(tmp_path) == table
    del content["output_tokens"]
    (tmp_path / "latency.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ArtifactError, match="output_tokens"):
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


def test_the_largest_size_that_is_fast_enough_is_kept(
    data, teacher, exact, runtime, tmp_path, monkeypatch
):
    listed = []
    real = confirming.possible
    for module in (confirming, ways):
        monkeypatch.setattr(module, "possible", lambda *a, **k: listed.append(a) or real(*a, **k))
    config = one_axis(data, itl_ms="85%")
    made = prune(config, source=teacher, latency=exact, out=tmp_path / "pruned")
    assert len(listed) == 2  # for the corners, and for what is timed: predictions were right
    kept, shape = read_shape(made.path), read_shape(teacher.path)
    before = cells(shape, [2])[0].itl_ms["p50"]
    assert cells(kept, [2])[0].itl_ms["p50"] <= 0.85 * before
    larger = kept.with_sizes(ffn=kept.ffn + 8)
    assert cells(larger, [2])[0].itl_ms["p50"] > 0.85 * before
    record = made.metrics["latency"]
    assert record["lane"] == "plain"
    assert record["tried"][0]["verdict"] == "kept"
    assert record["corners"][0]["name"] == "unpruned"


EXPERT_FFN = {"kind": "expert_ffn", "multiple_of": 8}


@pytest.mark.parametrize("axis", [EXPERT_FFN, "experts"])
def test_experts_are_cut_to_what_is_fast_enough(data, settings, mixture, runtime, tmp_path, axis):
    change = {"axes": ["experts", EXPERT_FFN]}
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


LONG = 4 * INPUT_TOKENS


@pytest.fixture
def two_lengths(settings, teacher, tmp_path):
    change = {"input_tokens": (INPUT_TOKENS, LONG)}
    return written(tmp_path / "two", LatencyConfig.model_validate(settings | change), teacher)


def test_a_limit_holds_at_the_lengths_it_names(data, teacher, two_lengths, runtime, tmp_path):
    shape = read_shape(teacher.path)
    ms = cells(shape, [2], input_tokens=LONG)[0].itl_ms["p50"]
    config = one_axis(data, itl_ms=0.85 * ms, input_tokens=LONG)
    made = prune(config, source=teacher, latency=two_lengths, out=tmp_path / "pruned")
    kept = cells(read_shape(made.path), [2], input_tokens=LONG)[0]
    assert 0.8 * ms < kept.itl_ms["p50"] <= 0.85 * ms
    assert [(one.input_tokens, one.output_tokens) for one in runtime.workloads] == [(LONG, 3)]
    record = made.metrics["latency"]
    assert (record["limit"]["input_tokens"], record["limit"]["output_tokens"]) == (LONG, 3)
    assert record["before"]["itl_ms"] == pytest.approx(ms)


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ({}, rf"2 pairs of lengths: {INPUT_TOKENS} \+ 3, {LONG} \+ 3"),
        ({"output_tokens": 3}, "2 pairs of lengths"),
        ({"input_tokens": 9}, rf"9 \+ any tokens are not .* {INPUT_TOKENS} \+ 3, {LONG} \+ 3"),
        ({"input_tokens": LONG, "output_tokens": 4}, rf"{LONG} \+ 4 tokens are not"),
    ],
)
def test_lengths_that_are_not_one_pair_of_the_table_list_the_choices(
    data, teacher, two_lengths, tmp_path, lengths, said
):
    config = one_axis(data, itl_ms="85%", **lengths)
    with pytest.raises(ConfigError, match=said):
        prune(config, source=teacher, latency=two_lengths, out=tmp_path / "pruned")


def test_the_error_is_stated_for_the_lengths(two_lengths):
    table = read_table(two_lengths.path)
    first, *probes = table.lanes["plain"].rows
    cells = [
        cell if cell.input_tokens == LONG else cell.model_copy(update={"itl_ms": {"p50": 1.0}})
        for cell in first.cells
    ]
    rows = [first.model_copy(update={"cells": cells}), *probes]
    lane = table.lanes["plain"].model_copy(update={"rows": rows})
    noisy = table.model_copy(update={"lanes": {"plain": lane}})
    found = [noisy.model("plain", lengths=each).fits["itl_ms", 2] for each in table.lengths]
    assert found[0].max_error > 0.1
    assert found[1].max_error < 1e-6


def test_candidates_are_timed_on_the_real_runtime(data, shallow, table, forked, tmp_path):
    config = one_axis(data, itl_ms="1000%", batch=1, min_speedup=0.01, input_tokens=12)
    budget = config.budget.model_copy(update={"params": 0.9})
    out = tmp_path / "pruned"
    made = prune(
        config.model_copy(update={"budget": budget}), source=shallow, latency=table, out=out
    )
    (row,) = made.metrics["latency"]["tried"]
    assert row["verdict"] == "kept"
    assert 0 < row["measured"]["itl_ms"] < 10 * row["before"]["itl_ms"]
    assert read_shape(out).parameters <= 0.9 * read_shape(shallow.path).parameters


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


def found_corners(place, config, teacher, limit, kl_nats, gain=1.0):
    """What the corners find under ``limit``, and the limits in milliseconds."""
    table = read_table(written(place, config, teacher, kl_nats=kl_nats, gain=gain).path)
    budget = Budget(latency=limit)
    found = corners(
        budget,
        table,
        config.axes,
        PruneConfig(axes=AXES, budget=Budget(params=0.5)).target,
        points=POINTS,
        search=Search(max_width_pruning=0.6, max_depth_pruning=0.5),
    )
    return found, limits_of(budget, table)


def unpruned_ms(teacher):
    return cells(read_shape(teacher.path), [2])[0].itl_ms["p50"]


def test_every_lane_stands_unpruned_and_pruned(config, teacher, tmp_path):
    limit = {"itl_ms": "80%", "batch": 2}
    nats = {"plain": 0.0, "quick": 0.1}
    found, limits = found_corners(tmp_path / "t", config, teacher, limit, nats)
    assert [(one.lane, one.name == "unpruned", one.fits) for one in found] == [
        ("plain", True, False),
        ("quick", True, True),
        ("plain", False, True),
        ("quick", False, True),
    ]
    # A share counts from the first lane, so that it asks the same of all of them.
    ms = unpruned_ms(teacher)
    assert limits == {"itl_ms": pytest.approx(0.8 * ms)}
    assert found[2].costs["itl_ms"] <= 0.8 * ms
    # What fits unpruned is cut as little as gains anything.
    assert found[3].costs["itl_ms"] <= 0.5 * ms / 1.02
    assert all(cut.nats > plain.nats for plain, cut in zip(found[:2], found[2:], strict=True))


def test_a_format_that_is_fast_enough_by_itself_ends_the_pruning(config, teacher, tmp_path):
    limit = {"itl_ms": 0.75 * unpruned_ms(teacher), "batch": 2}
    nats = {"plain": 0.0, "quick": 0.05}
    found, limits = found_corners(tmp_path / "t", config, teacher, limit, nats)
    with pytest.raises(PruningDoesNotPayError, match="pruning does not pay") as caught:
        choose_corner(found, limits)
    assert (caught.value.verdict.lane, caught.value.verdict.name) == ("quick", "unpruned")
    assert "lane quick" in caught.value.hint
    for one in found:
        assert f"{one.lane}, {one.name}: {one.words}" in caught.value.told


def measured_over(place, config, teacher, slower):
    """A table whose unpruned model takes ``slower`` times what the probes say of it."""
    table = read_table(written(place, config, teacher, kl_nats={"plain": 0.0}).path)
    first, *probes = table.lanes["plain"].rows
    scaled = [
        cell.model_copy(update={"itl_ms": {p: slower * v for p, v in cell.itl_ms.items()}})
        for cell in first.cells
    ]
    rows = [first.model_copy(update={"cells": scaled}), *probes]
    lane = table.lanes["plain"].model_copy(update={"rows": rows})
    return table.model_copy(update={"lanes": {"plain": lane}})


def test_what_is_predicted_to_fit_unpruned_and_does_not_is_still_cut(
    config, teacher, tmp_path, capsys
):
    measured_over(tmp_path / "t", config, teacher, 1.2).save(tmp_path)
    limit = 1.1 * unpruned_ms(teacher)
    space = SearchSpace(axes=AXES, budget={"latency": {"itl_ms": limit, "batch": 2}})
    dry_run(space, teacher.path, table=tmp_path, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["verdict"]["pruning_pays"]
    assert told["candidates"]
    assert all(0 < one["costs"]["itl_ms"] <= limit for one in told["candidates"])


@pytest.mark.parametrize("slower", [0.9, 1.0, 1.2])
@pytest.mark.parametrize("limit_share", [0.95, 1.1, 1.3])
def test_the_unpruned_model_fits_by_what_it_measured(
    config, teacher, tmp_path, slower, limit_share
):
    """Its prediction may say otherwise: the cost that is shown is the one that is judged."""
    ms = unpruned_ms(teacher)
    changed = measured_over(tmp_path / "t", config, teacher, slower)
    limit = {"itl_ms": limit_share * ms, "batch": 2}
    target = PruneConfig(axes=AXES, budget=Budget(params=0.5)).target
    search = Search(max_width_pruning=0.6, max_depth_pruning=0.5)
    plain, cut = corners(
        Budget(latency=limit), changed, config.axes, target, points=POINTS, search=search
    )
    assert plain.costs["itl_ms"] == pytest.approx(slower * ms)
    assert plain.fits is (slower <= limit_share)
    most = plain.costs["itl_ms"] / 1.02 if plain.fits else limit["itl_ms"]
    assert cut.costs["itl_ms"] <= most


def test_pruning_pays_where_the_fast_format_costs_more(config, teacher, tmp_path):
    limit = {"itl_ms": 0.97 * unpruned_ms(teacher), "batch": 2}
    nats = {"plain": 0.0, "quick": 2.0}
    verdict = choose_corner(*found_corners(tmp_path / "t", config, teacher, limit, nats))
    assert (verdict.pruning_pays, verdict.lane) == (True, "plain")
    assert "quick keeps" in verdict.words


def test_pruning_pays_in_the_fast_format_where_no_format_is_fast_enough(config, teacher, tmp_path):
    limit = {"itl_ms": "45%", "batch": 2}
    nats = {"plain": 0.0, "quick": 0.05}
    found, limits = found_corners(tmp_path / "t", config, teacher, limit, nats)
    verdict = choose_corner(found, limits)
    assert (verdict.pruning_pays, verdict.lane) == (True, "quick")
    assert "no lane keeps" in verdict.words
    # Slower by far, the first lane has no sizes for that: it stands as near as it gets.
    near = found[2].costs["itl_ms"]
    assert not found[2].fits
    assert limits["itl_ms"] < near < found[0].costs["itl_ms"]
    assert found[2].nats > found[0].nats
    least = near / LOOSER**2
    tighter = {"itl_ms": least, "batch": 2, "lane": "plain"}
    with pytest.raises(ModelError):
        found_corners(tmp_path / "u", config, teacher, tighter, nats)


def test_nothing_that_fits_is_an_error_with_the_least_that_is_reached(config, teacher, tmp_path):
    limit = {"itl_ms": "1%", "batch": 2}
    with pytest.raises(ModelError, match="none of the") as caught:
        found_corners(tmp_path / "t", config, teacher, limit, {"plain": 0.0, "quick": 0.0})
    assert "the least that they reach is" in caught.value.hint


# --- batch sizes --------------------------------------------------------------------------------

GAIN = 0.6
"""Two sequences take 1.2 times as long as one."""


def single_tokens_per_s(teacher):
    """Of the unpruned model at batch size 1."""
    (cell,) = cells(read_shape(teacher.path), [1])
    return 3000 / (cell.ttft_ms["p50"] + 2 * cell.itl_ms["p50"])


def test_the_corners_of_several_batch_sizes_are_those_of_each(config, teacher, tmp_path):
    nats = {"plain": 0.0, "quick": 0.1}
    goal = {"tokens_per_s": 1.5 * single_tokens_per_s(teacher)}
    both, limits = found_corners(
        tmp_path / "t", config, teacher, goal | {"batches": [1, 2]}, nats, GAIN
    )
    assert [one.where for one in both[:4]] == [
        f"{lane} at batch size {batch}" for lane in nats for batch in (1, 2)
    ]
    for batch in (1, 2):
        single = goal | {"batch": batch}
        alone, of_one = found_corners(tmp_path / f"t{batch}", config, teacher, single, nats, GAIN)
        assert limits == of_one
        assert [replace(one, batch=None) for one in both if one.batch == batch] == alone


def test_a_larger_batch_alone_may_reach_the_goal(config, teacher, tmp_path):
    goal = {"tokens_per_s": 1.5 * single_tokens_per_s(teacher), "batches": [1, 2]}
    found, limits = found_corners(tmp_path / "t", config, teacher, goal, {"plain": 0.0}, GAIN)
    with pytest.raises(PruningDoesNotPayError, match="in the lane plain at batch size 2") as caught:
        choose_corner(found, limits)
    assert (caught.value.verdict.name, caught.value.verdict.batch) == ("unpruned", 2)


def test_a_batch_that_makes_its_users_wait_too_long_is_not_taken(config, teacher, tmp_path):
    (one,) = cells(read_shape(teacher.path), [1])
    goal = {"tokens_per_s": 1.5 * single_tokens_per_s(teacher), "batches": [1, 2]}
    limit = goal | {"itl_ms": 1.1 * one.itl_ms["p50"]}
    found, limits = found_corners(tmp_path / "t", config, teacher, limit, {"plain": 0.0}, GAIN)
    verdict = choose_corner(found, limits)
    assert (verdict.pruning_pays, verdict.batch) == (True, 2)
    assert found[1].costs["token_ms"] <= limits["token_ms"]
    assert found[1].costs["itl_ms"] > limits["itl_ms"]


@pytest.mark.parametrize(
    ("limit", "what"),
    [
        ({"tokens_per_s": 9, "batches": [1, 2], "batch": 2}, "batch or batches, not both"),
        ({"tokens_per_s": 9, "batches": [2, 2]}, "stands twice"),
        ({"tokens_per_s": 9, "batches": [2]}, "at least 2"),
        ({"itl_ms": 9, "batches": [1, 2]}, "needs tokens_per_s"),
        ({"tokens_per_s": "120%", "batches": [1, 2]}, "limits in numbers"),
        ({"tokens_per_s": 9, "itl_ms": "90%", "batches": [1, 2]}, "limits in numbers"),
    ],
)
def test_a_choice_of_batch_sizes_that_means_nothing_is_refused(limit, what):
    with pytest.raises(ValidationError, match=what):
        LatencyLimit(**limit)


def test_a_choice_of_batch_sizes_comes_back_from_json():
    limit = LatencyLimit(tokens_per_s=9, batches=[1, 2])
    assert LatencyLimit.model_validate_json(limit.model_dump_json()) == limit


def test_a_batch_size_that_was_not_measured_is_an_error(config, teacher, tmp_path):
    goal = {"tokens_per_s": single_tokens_per_s(teacher), "batches": [2, 64]}
    with pytest.raises(ModelError, match="64"):
        found_corners(tmp_path / "t", config, teacher, goal, {"plain": 0.0}, GAIN)


def test_only_scores_choose_among_batch_sizes(data, config, teacher, runtime, tmp_path):
    table = written(tmp_path / "t", config, teacher, gain=GAIN)
    goal = {"tokens_per_s": 2 * single_tokens_per_s(teacher), "batches": [1, 2]}
    asked = one_axis(data, itl_ms=1).model_copy(update={"budget": Budget(latency=goal)})
    with pytest.raises(ConfigError, match=r"batches \[1, 2\] leaves a choice"):
        prune(asked, source=teacher, latency=table, out=tmp_path / "p")


def test_candidates_are_timed_at_the_batch_size_that_was_chosen(
    searched, config, teacher, runtime, tmp_path, capsys
):
    runtime.gain = GAIN
    table = written(tmp_path / "t", config, teacher, gain=GAIN)
    goal = {"tokens_per_s": 1.8 * single_tokens_per_s(teacher), "batches": [1, 2]}
    asked = PruneConfig.model_validate(searched[0] | {"budget": {"latency": goal}})
    inputs = {"source": teacher.path, "scores": searched[1], "latency": table.path}
    ranking(asked, inputs, as_json=False)
    assert "plain at batch size 2" in capsys.readouterr().out
    points = read_points(searched[1])
    bench = confirming.bench_of(asked, table, teacher, tmp_path / "work", points=points)

    def rank(within):
        found = possible(asked.axes, read_shape(teacher.path), within, asked.target, slack=0.1)
        return ranked(found, points, asked.axes, asked.search)

    kept = bench.confirm(rank(bench.corrected()), rank, 1)
    assert [one.batch_size for one in runtime.workloads] == [2]
    record = bench.record()
    assert (record["limit"]["batch"], record["verdict"]["batch"]) == (2, 2)
    assert record["tried"][-1]["name"] == bench.name(kept[0].candidate)


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


@pytest.mark.parametrize(("limit", "said"), [("80%", "at most"), ("110%", "pruning is not needed")])
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
    assert told["lengths"] == {"input_tokens": INPUT_TOKENS, "output_tokens": 3}
    assert told["prediction_errors"]["itl_ms"] == pytest.approx(0, abs=1e-6)


@pytest.fixture
def searched(data, teacher, tmp_path):
    """Settings of a search in JSON's form, and what scoring would have left."""
    config = {"axes": AXES, "calibration_tokens": 64, "data": data,
              "search": {"max_width_pruning": 0.6, "max_depth_pruning": 0.5}}  # fmt: skip
    space = PruneConfig.model_validate(config | {"budget": {"params": 0.9}})
    inputs = {"source": teacher}
    with writing(tmp_path / "sc", kind="scores", config=scoring_of(space), inputs=inputs) as draft:
        write_points(POINTS, draft.path)
    return config, tmp_path / "sc"


def looked(config, limit, inputs, capsys, *, as_json=False):
    """What a search's dry run prints."""
    budget = {"latency": {"itl_ms": limit, "batch": 2}}
    ranking(PruneConfig.model_validate(config | {"budget": budget}), inputs, as_json=as_json)
    return capsys.readouterr().out


def test_a_dry_search_says_whether_pruning_pays(searched, config, teacher, tmp_path, capsys):
    """Quantize only under a loose limit; pruned and quantized under one that no format meets."""
    nats = {"plain": 0.0, "quick": 0.05}
    timed = written(tmp_path / "two", config, teacher, kl_nats=nats).path
    inputs = {"source": teacher.path, "scores": searched[1], "latency": timed}
    ms = unpruned_ms(teacher)

    loose = looked(searched[0], 0.75 * ms, inputs, capsys)
    assert "pruning does not pay: the format alone keeps" in loose
    assert "legal" not in loose

    told = json.loads(looked(searched[0], 0.75 * ms, inputs, capsys, as_json=True))
    assert told["candidates"] == []
    assert told["verdict"] | {"words": ""} == {
        "pruning_pays": False, "lane": "quick", "name": "unpruned", "words": "", "batch": None
    }  # fmt: skip
    assert [(one["lane"], one["name"] == "unpruned") for one in told["corners"]] == [
        ("plain", True), ("quick", True), ("plain", False), ("quick", False)
    ]  # fmt: skip
    assert all(one["costs"]["itl_ms"] > 0 and one["nats"] >= 0 for one in told["corners"])

    tight = looked(searched[0], 0.45 * ms, inputs, capsys)
    assert "pruning pays: no lane keeps the limit of" in tight
    assert "quick with" in tight

    told = json.loads(looked(searched[0], 0.45 * ms, inputs, capsys, as_json=True))
    assert (told["verdict"]["pruning_pays"], told["verdict"]["lane"]) == (True, "quick")
    predicted = [one["predicted_nats"] for one in told["candidates"]]
    assert predicted == sorted(predicted)
    best = next(one for one in told["corners"] if one["name"] == told["verdict"]["name"])
    assert best["nats"] == pytest.approx(predicted[0] + nats["quick"])


def test_a_dry_search_without_scores_is_refused(searched, exact, teacher):
    config = PruneConfig.model_validate(searched[0] | {"budget": {"params": 0.9}})
    with pytest.raises(ConfigError, match="by their scores"):
        ranking(config, {"source": teacher.path, "latency": exact.path})


def test_a_search_where_pruning_does_not_pay_leaves_nothing(
    searched, config, teacher, tmp_path, runtime
):
    nats = {"plain": 0.0, "quick": 0.05}
    timed = written(tmp_path / "two", config, teacher, kl_nats=nats)
    limit = {"latency": {"itl_ms": 0.75 * unpruned_ms(teacher), "batch": 2}}
    asked = PruneConfig.model_validate(searched[0] | {"budget": limit})
    scores = Artifact.open(searched[1])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(PruningDoesNotPayError, match="pruning does not pay"):
        prune(asked, source=teacher, scores=scores, latency=timed, out=tmp_path / "pruned")
    assert sorted(tmp_path.iterdir()) == before
    assert runtime.timed == []


# --- the machine's own speed --------------------------------------------------------------------


@pytest.mark.parametrize("drift", [0.8, 1.25])
def test_a_share_follows_the_machine_and_milliseconds_do_not(config, teacher, tmp_path, drift):
    table = read_table(written(tmp_path / "t", config, teacher).path)
    ms = unpruned_ms(teacher)
    share, number = (
        stopwatch(LatencyLimit(itl_ms=given, batch=2), table, "plain")
        for given in ("70%", 0.7 * ms)
    )
    now = {"itl_ms": drift * ms}
    assert share.limits() == number.limits() == {"itl_ms": pytest.approx(0.7 * ms)}
    assert share.limits_beside(now) == {"itl_ms": pytest.approx(0.7 * drift * ms)}
    assert number.limits_beside(now) == {"itl_ms": pytest.approx(0.7 * ms)}


def test_milliseconds_are_held_on_a_slower_machine_too(
    data, teacher, exact, monkeypatch, tmp_path, runtime
):
    """All is a fifth slower than for the table, the unpruned model as well."""
    real = runtime.time
    monkeypatch.setattr(runtime, "slower", 1.2)

    def time(stand, shapes, benchmark, work):
        found = real(stand, shapes, benchmark, work)
        shape = read_shape(stand.source.path)
        return found | {SOURCE: cells(shape, benchmark.batch_sizes, 1.2)}

    monkeypatch.setattr(runtime, "time", time)
    limit = 0.85 * unpruned_ms(teacher)
    made = prune(
        one_axis(data, itl_ms=limit), source=teacher, latency=exact, out=tmp_path / "pruned"
    )
    tried = made.metrics["latency"]["tried"]
    assert [row["verdict"] for row in tried] == ["over the limit", "kept"]
    assert 1.2 * cells(read_shape(made.path), [2])[0].itl_ms["p50"] <= limit


@pytest.mark.parametrize("given", [{"itl_ms": 5.0}, {"ttft_ms": "9%"}, {"tokens_per_s": 100.0}])
def test_a_limit_takes_other_milliseconds(config, teacher, tmp_path, given):
    table = read_table(written(tmp_path / "t", config, teacher).path)
    watch = stopwatch(LatencyLimit(**given, batch=2), table, "plain")
    asked = {name: 0.9 * ms for name, ms in watch.before().items()}
    made = stopwatch(at_most(watch.limit, asked), table, "plain")
    assert made.limits() == {name: pytest.approx(ms) for name, ms in asked.items()}
