"""Every alarm is raised by its sickness and by no healthy run."""

import json
import math
import random
from pathlib import Path

import pytest

from trt_kd.training.alarms import ALARMS, WINDOW, Watch, alarms_of

RECORDED = Path(__file__).parent / "recorded"
STEPS = 300
EVERY = 20
LAYERS = 8
PAIRS = ("feature_mse_0_0", "feature_mse_1_3", "feature_mse_2_6")


def decay(step, start, end, half=60):
    return end + (start - end) * 0.5 ** (step / half)


def write(steps, jitter):
    """Texts of the student that become a little shorter."""
    for row in steps:
        row["generated_tokens"] = decay(row["step"], 50, 40) * jitter()


def healthy(seed=0, noise=0.1, *, task=True, response=True, features=True, sign=1):
    """A run whose losses fall to a floor under the noise of small batches."""
    source = random.Random(seed)

    def jitter():
        return math.exp(noise * source.gauss(0, 1))

    steps, measured = [], []
    for step in range(STEPS + 1):
        row = {"step": step, "grad_norm": decay(step, 4, 1) * jitter()}
        if task:
            row["task_nats_per_token"] = decay(step, 4.0, 3.2) * jitter() ** sign
        if response:
            row["response_nats_per_token"] = decay(step, 0.9, 0.25) * jitter()
        if features:
            row |= {name: decay(step, 1.0, 0.3) * jitter() for name in PAIRS}
        if step:
            steps.append(row)
        if step % EVERY == 0:
            wave = math.exp(0.2 * noise * source.gauss(0, 1))
            held = {
                "step": step,
                "heldout_task_nats_per_token": decay(step, 4.1, 3.3),
                "heldout_entropy_nats_per_token": decay(step, 3.8, 3.0) * wave,
                "monitor_seconds": 0.1,
            }
            if response:
                held["heldout_kl_nats_per_token"] = decay(step, 0.9, 0.27)
                held["heldout_top1_agreement"] = 1 - decay(step, 0.45, 0.25)
            if step:
                scale = decay(step, 2, 0.5) * jitter()
                held |= {f"grad_norm_layer_{n}": scale * jitter() / (n + 1) for n in range(LAYERS)}
                held["grad_norm_outside_layers"] = scale
            measured.append(held)
    write(steps[::3], jitter)
    return steps, measured


def task_stalls(steps, measured):
    for row in measured:
        row["heldout_task_nats_per_token"] = 3.2 + 0.0002 * row["step"]


def response_rises(steps, measured):
    for row in steps[120:]:
        row["response_nats_per_token"] *= 1.0 + 0.02 * (row["step"] - 120)


def response_spikes(steps, measured):
    steps[150]["response_nats_per_token"] *= 6


def early_gradient_spike(steps, measured):
    for layer in (0, 1):
        measured[-2][f"grad_norm_layer_{layer}"] *= 30


def entropy_collapse(steps, measured):
    for row in measured:
        row["heldout_entropy_nats_per_token"] = decay(row["step"], 3.8, 0.4)


def feature_collapse(steps, measured):
    for row in steps:
        row["feature_mse_1_3"] = 0.5 ** (row["step"] / 8)


def late_pairs_diverge(steps, measured):
    for row in steps[100:]:
        row["feature_mse_2_6"] *= 1.0 + 0.01 * (row["step"] - 100)


def texts_shrink(steps, measured):
    for row in steps:
        if "generated_tokens" in row:
            row["generated_tokens"] *= 0.5 ** (row["step"] / 60)


def texts_grow(steps, measured):
    for row in steps:
        if "generated_tokens" in row:
            row["generated_tokens"] *= 2 ** (row["step"] / 60)


SICK = {
    "task_stalls": [task_stalls],
    "response_rises": [response_rises, response_spikes],
    "early_gradient_spike": [early_gradient_spike],
    "entropy_collapse": [entropy_collapse],
    "feature_collapse": [feature_collapse],
    "late_pairs_diverge": [late_pairs_diverge],
    "length_drift": [texts_shrink, texts_grow],
}


def rising_weight():
    """Gradients of all layers grow thirtyfold with a weight: no spike of the early ones."""
    steps, measured = healthy(5)
    for row in measured:
        for name in row:
            if name.startswith("grad_norm"):
                row[name] *= 1 + 30 * row["step"] / STEPS
    return steps, measured


def at_the_floor():
    """A student that starts where it ends: nothing falls any more."""
    steps, measured = healthy(6)
    for row in [*steps, *measured]:
        for name, value in healthy(6)[1][-1].items():
            if name in row and name.startswith("heldout"):
                row[name] = value * (1 + 0.002 * math.sin(row["step"]))
    return steps, measured


def recorded():
    """A distillation of a tiny model, as its artifact holds it."""
    return tuple(
        [json.loads(line) for line in (RECORDED / name).read_text("utf-8").splitlines()]
        for name in ("history.jsonl", "monitors.jsonl")
    )


HEALTHY = {
    **{f"noise {noise:g}, seed {seed}": (lambda n=noise, s=seed: healthy(s, n))
       for noise in (0.0, 0.05, 0.15) for seed in range(3)},
    "response alone": lambda: healthy(1, task=False, features=False),
    "hard labels alone": lambda: healthy(2, response=False, features=False),
    "a weight that rises": rising_weight,
    "a student at its floor": at_the_floor,
    "one step": lambda: tuple(rows[:1] for rows in healthy(3)),
    "no measurement": lambda: (healthy(4)[0], []),
    "recorded": recorded,
}  # fmt: skip

CASES = [
    pytest.param(alarm, sicken, id=f"{alarm.name}: {sicken.__name__}")
    for alarm in ALARMS
    for sicken in SICK[alarm.name]
]


@pytest.mark.parametrize("make", HEALTHY.values(), ids=HEALTHY.keys())
def test_a_healthy_run_raises_no_alarm(make):
    assert alarms_of(*make()) == {}


@pytest.mark.parametrize(("alarm", "sicken"), CASES)
@pytest.mark.parametrize("seed", range(3))
def test_an_alarm_is_raised_by_its_sickness_and_by_no_other(alarm, sicken, seed):
    steps, measured = healthy(seed)
    sicken(steps, measured)
    assert set(alarms_of(steps, measured)) == {alarm.name}


@pytest.mark.parametrize(("alarm", "sicken"), CASES)
def test_an_alarm_looks_at_the_first_row_and_the_newest_ones_only(alarm, sicken):
    steps, measured = healthy()
    sicken(steps, measured)
    step = alarms_of(steps, measured)[alarm.name]
    seen = [[row for row in rows if row["step"] <= step] for rows in (steps, measured)]
    assert alarm.fires(*([rows[0], *rows[-WINDOW:]] for rows in seen))


@pytest.mark.parametrize(("alarm", "sicken"), CASES)
def test_a_run_that_is_cut_off_and_resumed_raises_the_same_alarms_at_the_same_steps(alarm, sicken):
    steps, measured = healthy()
    sicken(steps, measured)
    whole = alarms_of(steps, measured)
    cut = STEPS // 2
    part = [[row for row in rows if row["step"] <= cut] for rows in (steps, measured)]
    assert alarms_of(*part) == {name: step for name, step in whole.items() if step <= cut}


def test_an_alarm_is_said_once():
    steps, measured = healthy()
    response_rises(steps, measured)
    watch = Watch()
    said = [alarm.name for row in steps for alarm in watch.step(row)]
    assert said == ["response_rises"]
    assert watch.fired == alarms_of(steps, [])


@pytest.mark.parametrize("alarm", ALARMS, ids=lambda alarm: alarm.name)
def test_an_alarm_says_what_is_seen_what_helps_and_who_says_so(alarm):
    assert alarm.says[0].islower()
    assert not alarm.says.endswith(".")
    assert alarm.advice[0].islower()
    assert not alarm.advice.endswith(".")
    assert "arXiv:" in alarm.source
    assert len(alarm.says) <= 100
    assert alarm.fires.__doc__
    assert not alarm.fires([], [])
