"""Without a terminal there are lines: at the first step, every minute, at the last."""

import logging

import pytest

from trt_kd.measuring import progress as module
from trt_kd.measuring.progress import Steps, progress


@pytest.fixture
def lines(caplog):
    """Messages so far."""
    caplog.set_level(logging.INFO, logger=module.__name__)
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_line_comes_first_then_every_minute_and_last(lines):
    now = iter([0.0, *range(10, 101, 10)])
    with Steps("refitting", 10, lambda: next(now)) as steps:
        for _ in range(10):
            steps.step()
    assert lines() == [
        "refitting 1 of 10, 90 s left",
        "refitting 7 of 10, 30 s left",
        "refitting 10 of 10, 100 s",
    ]


def test_a_loop_sees_every_item_and_ends_with_a_line(lines):
    assert list(progress(["a", "b", "c"], "scoring")) == ["a", "b", "c"]
    assert lines()[-1].startswith("scoring 3 of 3, ")


def test_a_loop_over_nothing_says_nothing(lines):
    assert list(progress([], "scoring")) == []
    assert lines() == []


def test_a_terminal_gets_a_bar_and_no_lines(lines, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert list(progress([1, 2], "scoring")) == [1, 2]
    assert lines() == []
    assert "scoring: 100%" in capsys.readouterr().err


def test_an_error_inside_the_loop_closes_the_bar():
    with pytest.raises(KeyError), Steps("refitting", 2):
        raise KeyError
