"""Metrics by their stored definitions, against arithmetic by hand."""

import pytest

from trt_kd.measuring.clock import Workload
from trt_kd.measuring.metrics import DEFINITIONS, of_steps, summarise, time_per_output_token_ms

LOAD = Workload(batch_size=4, input_tokens=100, output_tokens=5)
STEPS = [0.5, 0.1, 0.1, 0.2, 0.1]


def test_a_batch_of_steps_by_hand():
    found = of_steps(STEPS, LOAD)
    assert (found.ttft_ms, found.e2e_ms) == pytest.approx((500.0, 1000.0))
    assert found.itl_ms == pytest.approx([100.0, 100.0, 200.0, 100.0])
    assert found.tpot_ms == pytest.approx(500.0 / 4)
    assert found.output_tokens_per_s == pytest.approx(20.0)
    assert found.input_tokens_per_s == pytest.approx(400.0)
    assert found.requests_per_s == pytest.approx(4.0)
    assert found.tokens_per_s_per_user == pytest.approx(8.0)


def test_tpot_divides_by_the_tokens_after_the_first_content():
    assert time_per_output_token_ms(100.0, 600.0, 11, 1) == pytest.approx(50.0)
    assert time_per_output_token_ms(100.0, 600.0, 11, 6) == pytest.approx(100.0)
    assert time_per_output_token_ms(100.0, 100.0, 6, 6) is None


@pytest.mark.parametrize(("tokens", "first"), [(3, 0), (3, 4)])
def test_counts_that_contradict_are_refused(tokens, first):
    with pytest.raises(ValueError, match="cannot be"):
        time_per_output_token_ms(1.0, 2.0, tokens, first)


def test_steps_of_another_workload_are_refused():
    with pytest.raises(ValueError, match="not the workload's 5"):
        of_steps(STEPS[:4], LOAD)


def test_one_output_token_has_a_first_and_nothing_after():
    one = Workload(batch_size=1, input_tokens=3, output_tokens=1)
    found = summarise([of_steps([0.25], one)])
    assert found["itl_ms"] is found["tpot_ms"] is found["tokens_per_s_per_user"] is None
    assert found["e2e_ms"] == found["ttft_ms"]


def test_every_number_of_a_record_has_its_definition():
    found = summarise([of_steps(STEPS, LOAD)] * 3)
    undefined = set(found) - set(DEFINITIONS)
    assert undefined == {"repeats", "coefficient_of_variation", "autocorrelation"}
    assert found["spread"] == 0.0


def test_one_run_has_no_interval():
    assert summarise([of_steps(STEPS, LOAD)])["intervals"] == {}
