"""Steps are measured one by one, by a clock that tests may set."""

import pytest

from trt_kd.measuring.clock import Workload, measure_call, measure_steps


class Clock:
    """Time passes only when told to."""

    now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Fake:
    """Decodes nothing, in a time of its own."""

    def __init__(self, clock, *, prefill_s, step_s):
        self.clock, self.prefill_s, self.step_s = clock, prefill_s, step_s

    def steps(self, prompts, new_tokens):
        self.clock.sleep(self.prefill_s)
        for _ in range(new_tokens):
            self.clock.sleep(self.step_s)
            yield


def test_measures_prefill_and_steps_apart():
    clock = Clock()
    fake = Fake(clock, prefill_s=0.050, step_s=0.010)
    times = measure_steps(fake, [[1, 2]] * 4, 6, clock)
    assert times == pytest.approx([0.060] + [0.010] * 5)


def test_nothing_after_the_last_step_is_counted():
    clock = Clock()

    class Slow(Fake):
        def steps(self, prompts, new_tokens):
            yield from super().steps(prompts, new_tokens)
            self.clock.sleep(5.0)

    times = measure_steps(Slow(clock, prefill_s=0.0, step_s=0.010), [[1]], 3, clock)
    assert sum(times) == pytest.approx(0.030)


@pytest.mark.parametrize("difference", [-1, 1])
def test_another_number_of_steps_is_refused(difference):
    class Wrong:
        def steps(self, prompts, new_tokens):
            yield from [None] * (new_tokens + difference)

    with pytest.raises(ValueError, match="instead of 4"):
        measure_steps(Wrong(), [[1]], 4)


def test_a_call_is_measured_from_start_to_end():
    clock = Clock()
    assert measure_call(lambda: clock.sleep(2.5), clock) == pytest.approx(2.5)


@pytest.mark.parametrize("name", list(Workload.model_fields))
def test_a_workload_has_no_zero(name):
    sizes = {"batch_size": 1, "input_tokens": 1, "output_tokens": 1} | {name: 0}
    with pytest.raises(ValueError, match=name):
        Workload.model_validate(sizes)
