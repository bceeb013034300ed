import logging
from types import SimpleNamespace

import pytest

from trt_kd.training.callbacks import Progress
from trt_kd.training.history import final_losses, history_of


class Clock:
    """Time passes only when told to."""

    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def drive(caplog):
    """Run steps of a given duration and return the lines logged."""

    def run(steps, step_s, first=0):
        clock = Clock()
        progress = Progress(1024, clock)
        state = SimpleNamespace(global_step=first, max_steps=steps)
        with caplog.at_level(logging.INFO):
            progress.on_train_begin(None, state, None)
            for step in range(first + 1, steps + 1):
                clock.now += step_s
                state.global_step = step
                progress.on_log(None, state, None, logs={"loss": 1.0 / step})
            progress.on_log(None, state, None, logs={"train_runtime": 3.0})
            progress.close()
        return [record.getMessage() for record in caplog.records]

    return run


def test_without_a_terminal_a_line_comes_at_least_every_minute_and_at_the_end(drive):
    lines = drive(steps=100, step_s=2.0)
    assert lines[0] == "step 1 of 100: loss 1.0000, 512 tokens/s, 198 s left"
    assert [int(line.split()[1]) for line in lines] == [1, 31, 61, 91, 100]
    assert lines[-1].endswith(" 0 s left")


def test_a_resumed_run_counts_its_own_steps_for_the_speed(drive):
    assert drive(steps=100, step_s=4.0, first=90)[0].endswith("256 tokens/s, 36 s left")


def test_history_holds_one_row_per_step_and_nothing_else():
    log = [
        {"loss": 2.0, "response_nats_per_token": 2.0, "epoch": 0.5, "seconds": 1.0, "step": 1},
        {"loss": 1.0, "response_nats_per_token": 1.0, "epoch": 1.0, "seconds": 1.0, "step": 2},
        {"train_runtime": 9.0, "train_loss": 1.5, "step": 2},
    ]
    assert history_of(log) == [
        {"step": n, "loss_nats_per_token": x, "response_nats_per_token": x, "seconds": 1.0}
        for n, x in ((1, 2.0), (2, 1.0))
    ]


def test_final_losses_are_means_over_the_last_ten_steps():
    history = [
        {"step": n, "loss_nats_per_token": float(n), "task_nats_per_token": 2.0, "seconds": 1.0}
        for n in range(1, 21)
    ]
    assert final_losses(history) == {"loss_nats_per_token": 15.5, "task_nats_per_token": 2.0}
    assert final_losses(history[:2])["loss_nats_per_token"] == 1.5
