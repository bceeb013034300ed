"""Weights of the objective's terms are functions of the step alone."""

import math

import pytest
from pydantic import ValidationError

from trt_kd.config import StrictModel
from trt_kd.training.weights import (
    Weight,
    WeightSchedule,
    over_whole_run,
    peak,
    step_without_term,
    weight_at,
)

KINDS = ("warmup", "linear", "cosine")


class Settings(StrictModel):
    """Settings with a weight."""

    weight: Weight


def weight(value):
    return Settings(weight=value).weight


def values(value, total):
    return [weight_at(weight(value), step, total) for step in range(total)]


@pytest.mark.parametrize("value", [0, 0.5, 2, {"kind": "constant", "end": 0.5}])
def test_a_plain_number_is_the_same_at_every_step(value):
    number = value["end"] if isinstance(value, dict) else value
    assert weight(value) == number
    assert values(value, 7) == [number] * 7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [{}, {"steps": 8}, {"share": 0.5}, {"share": 0.01}, {"steps": 2}])
@pytest.mark.parametrize("total", [2, 16, 37])
def test_every_schedule_arrives_at_its_end_and_stays(kind, way, total):
    found = values({"kind": kind, "end": 0.7, **way}, total)
    length = way.get("steps") or max(2, math.ceil(way.get("share", 1.0) * total))
    assert all(value == pytest.approx(0.7) for value in found[length - 1 :])
    assert found == sorted(found)
    assert all(0.0 <= value <= 0.7 for value in found)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize(("start", "end"), [(0.2, 1.0), (1.0, 0.2), (1.0, 0.0)])
def test_a_ramp_begins_at_its_start_and_passes_the_middle_half_way(kind, start, end):
    found = values({"kind": kind, "start": start, "end": end, "steps": 11}, 20)
    assert found[0] == start
    assert found[5] == pytest.approx((start + end) / 2)
    assert found[10:] == [end] * 10


def test_a_linear_ramp_and_a_warmup_go_in_equal_parts_and_a_cosine_is_half_of_one():
    assert values({"kind": "linear", "end": 4}, 5) == [0, 1, 2, 3, 4]
    assert values({"kind": "warmup", "end": 5}, 5) == [1, 2, 3, 4, 5]
    cosine = [(1 - math.cos(math.pi * step / 4)) / 2 for step in range(5)]
    assert values({"kind": "cosine", "end": 1}, 5) == pytest.approx(cosine)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-0.1, "greater than or equal to 0"),
        ({"kind": "linear", "end": 1, "steps": 3, "share": 0.5}, "give one"),
        ({"kind": "linear", "end": 1, "share": 1.5}, "less than or equal to 1"),
        ({"kind": "linear", "start": 1, "end": 1}, "write the plain number"),
        ({"kind": "cosine", "end": 1, "steps": 1}, "steps must be at least 2"),
        ({"kind": "warmup", "start": 0, "end": 1}, "start has no effect"),
        ({"kind": "warmup", "end": 0}, "write the plain number"),
        ({"kind": "constant", "end": 1, "steps": 3}, "nothing but its value"),
        ({"kind": "exponential", "end": 1}, "'warmup', 'linear' or 'cosine'"),
        ({"kind": "linear"}, "end"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(value, message):
    with pytest.raises(ValidationError, match=message):
        weight(value)


@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_of_the_run_is_an_error(step):
    with pytest.raises(ValueError, match="0 to 9"):
        weight({"kind": "linear", "end": 1}).at(step, 10)


def test_settings_round_trip():
    for value in (0.3, {"kind": "cosine", "start": 0.1, "end": 1, "share": 0.3}):
        settings = Settings(weight=value)
        assert Settings.model_validate(settings.model_dump()) == settings
        assert Settings.model_validate_json(settings.model_dump_json()) == settings


FAMILY = [
    0.0, 0.5, *({"kind": kind, "end": 1.0, "steps": n} for kind in KINDS for n in (2, 5)),
    *({"kind": kind, "start": 1.0, "end": 0.0, "steps": n} for kind in KINDS[1:] for n in (2, 5)),
]  # fmt: skip


@pytest.mark.parametrize("total", [1, 2, 5, 9])
@pytest.mark.parametrize("first", FAMILY, ids=str)
def test_the_two_ends_of_a_run_tell_whether_some_step_has_no_term(first, total):
    for second in FAMILY:
        pair = [weight(first), weight(second)]
        bare = [n for n in range(total) if not any(weight_at(w, n, total) for w in pair)]
        found = step_without_term(pair, total)
        assert (found is not None) == bool(bare)
        assert found is None or found in bare


@pytest.mark.parametrize("value", FAMILY, ids=str)
def test_the_peak_is_zero_only_where_the_term_is_never_used(value):
    assert peak(weight(value)) >= max(values(value, 9))
    assert (peak(weight(value)) > 0) == any([*values(value, 9), *values(value, 2)])


def test_a_rehearsal_goes_the_whole_way_in_two_steps():
    schedule = WeightSchedule(kind="linear", start=0.25, end=1.0, steps=500)
    short = over_whole_run(schedule)
    assert [weight_at(short, step, 2) for step in range(2)] == [0.25, 1.0]
    assert over_whole_run(0.5) == 0.5
