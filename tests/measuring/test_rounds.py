"""Turns: ABBA, rows that never repeat, warm-up as long as it takes."""

import pytest

from trt_kd.measuring.clock import Workload
from trt_kd.measuring.rounds import Rounds


def loads(*sizes):
    return tuple(Workload(batch_size=size, input_tokens=8, output_tokens=4) for size in sizes)


def test_variants_take_turns_in_abba_order():
    order = list(Rounds(loads(2), repeats=3, warmup=1).turns(["a", "b"]))
    assert [turn.variant for turn in order] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [turn.repeat for turn in order] == [-1, -1, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_no_two_counted_rounds_share_a_row_and_all_variants_of_a_round_do(warmup):
    rounds = Rounds(loads(1, 4, 8), repeats=2, warmup=warmup)
    rows = {}
    for turn in rounds.turns(["a", "b", "c"]):
        numbers = range(turn.rows.start, turn.rows.stop)
        assert len(numbers) == turn.workload.batch_size
        rows.setdefault((turn.variant, turn.repeat < 0), []).extend(numbers)
    counted = rows["a", False]
    assert counted == rows["b", False] == rows["c", False]
    assert len(set(counted)) == len(counted) == 2 * 13
    assert not set(counted) & set(rows.get(("a", True), []))
    assert set(counted) | set(rows.get(("a", True), [])) == set(range(rounds.rows))


def test_warm_up_ends_when_told():
    asked = []

    def is_warm(workload):
        asked.append(workload.batch_size)
        return len(asked) == 2

    order = list(Rounds(loads(1), repeats=1, warmup=9).turns(["a"], is_warm))
    assert [turn.repeat for turn in order] == [-1, -1, 0]
