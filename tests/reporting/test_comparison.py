"""Ratios of two variants of one benchmark, against arithmetic by hand."""

import json

import pytest

from trt_kd.artifacts import Artifact, writing
from trt_kd.config import StageConfig
from trt_kd.errors import ConfigError
from trt_kd.measuring.statistics import ratio_interval
from trt_kd.reporting.comparison import METRICS, compare


class MadeConfig(StageConfig):
    stage = "benchmark"


@pytest.fixture
def made(tmp_path):
    def make(records, **files):
        out = tmp_path / "b"
        with writing(out, kind="benchmark", config=MadeConfig(), inputs={}) as draft:
            content = {"schema_version": 1, "variants": records}
            (draft.path / "benchmark.json").write_text(json.dumps(content))
            for name, lines in files.items():
                text = "".join(f"{json.dumps(line)}\n" for line in lines)
                (draft.path / f"{name}.jsonl").write_text(text)
        return Artifact.open(out)

    return make


def record(size, tokens=2, **changes):
    lengths = {"input_tokens": 8, "output_tokens": tokens}
    return {"batch_size": size, "steady": True} | lengths | changes


def runs(name, size, times, tokens=8):
    return [
        {"variant": name, "batch_size": size, "input_tokens": tokens, "repeat": n, "step_s": step_s}
        for n, step_s in enumerate(times)
    ]


def test_ratios_are_those_of_run_level_medians_pair_by_pair(made):
    slow = [[0.10, 0.02, 0.04, 0.02], [0.20, 0.04, 0.04, 0.09], [0.15, 0.03, 0.01, 0.03]]
    fast = [[time / 2 for time in run] for run in slow]
    samples = runs("a", 4, slow) + runs("b", 4, fast)
    found = compare(made({"a": [record(4, 4)], "b": [record(4, 4)]}, samples=samples), "a", "b")
    assert [each.metric for each in found] == list(METRICS)
    ttft, itl, rate = found
    for each, ratio in ((ttft, 0.5), (itl, 0.5), (rate, 2.0)):
        assert (each.low, each.ratio, each.high) == pytest.approx((ratio, ratio, ratio))
        assert (each.pairs, each.batch_size, each.steady) == (3, 4, True)


def test_the_interval_is_that_of_the_log_ratios(made):
    samples = runs("a", 1, [[1.0, 0.10], [1.0, 0.20]]) + runs("b", 1, [[1.0, 0.12], [1.0, 0.18]])
    itl = compare(made({"a": [record(1)], "b": [record(1)]}, samples=samples), "a", "b")[1]
    expected = ratio_interval([0.10, 0.20], [0.12, 0.18])
    assert (itl.low, itl.high) == pytest.approx((expected.low, expected.high))


def test_what_failed_or_drifted_gives_no_verdict(made):
    records = {
        "a": [record(1), record(2), record(3)],
        "b": [record(1, steady=False), record(2, error="no room"), record(3)],
    }
    samples = runs("a", 1, [[1.0, 0.1]] * 2) + runs("b", 1, [[1.0, 0.1]] * 2)
    found = compare(made(records, samples=samples), "a", "b")
    drifted, failed, single = found[0], found[3], found[6]
    assert (drifted.ratio, drifted.steady) == (pytest.approx(1.0), False)
    assert (failed.ratio, failed.reason) == (None, "no room")
    assert single.ratio is None
    assert "fewer than two rounds" in single.reason


def test_one_token_has_no_time_between_tokens(made):
    samples = runs("a", 1, [[1.0]] * 2) + runs("b", 1, [[2.0]] * 2)
    both = {name: [record(1, tokens=1)] for name in "ab"}
    found = compare(made(both, samples=samples), "a", "b")
    assert [each.ratio for each in found] == [pytest.approx(2.0), None, pytest.approx(0.5)]


def test_reports_of_a_load_generator_are_compared_too(made):
    def line(name, repeat, time, rate=None):
        times = {metric: {"p50": time} for metric in ("ttft_ms", "itl_ms")}
        return {
            "variant": name, **record(8), "request_rate": rate, "repeat": repeat,
            "times": times, "rates": {"output_tokens_per_s": 1 / time},
        }  # fmt: skip

    reports = [line(n, r, t) for r in range(2) for n, t in (("a", 2.0), ("b", 3.0))]
    reports.append(line("a", 0, 99.0, rate=5.0))
    found = compare(made({"a": [record(8)], "b": [record(8)]}, reports=reports), "a", "b")
    assert [each.ratio for each in found] == pytest.approx([1.5, 1.5, 1 / 1.5])


def test_lengths_of_a_sweep_are_compared_each_for_itself(made):
    sweep = [record(1), record(1, input_tokens=16)]
    samples = []
    for name, times in (("a", (1.0, 2.0)), ("b", (1.5, 6.0))):
        for tokens, time in zip((8, 16), times, strict=True):
            samples += runs(name, 1, [[time, time]] * 2, tokens)
    found = compare(made({"a": sweep, "b": sweep}, samples=samples), "a", "b")
    ttft = [each for each in found if each.metric == "ttft_ms"]
    assert [(each.input_tokens, each.ratio) for each in ttft] == [
        (8, pytest.approx(1.5)), (16, pytest.approx(3.0))
    ]  # fmt: skip


def test_an_unknown_variant_lists_the_known(made):
    with pytest.raises(ConfigError, match="did not measure c") as caught:
        compare(made({"a": [], "b": []}), "a", "c")
    assert caught.value.hint == "it has a, b"
