"""Distillation on what the student writes itself: what is learnt, that it survives, what not."""

from functools import partial

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from trt_kd.artifacts import work_directory
from trt_kd.checkpoints import load_model, load_tokenizer
from trt_kd.data.base import token_blocks
from trt_kd.errors import ConfigError
from trt_kd.stages.distill import distill
from trt_kd.training.on_policy import OnPolicy

pytestmark = pytest.mark.usefixtures("modelopt")

STEPS = 6
WRITE = {"share": 0.5, "prompt_tokens": 8, "new_tokens": 12}


@pytest.fixture(scope="module")
def student(make_student):
    return make_student(noise=0.05)


@pytest.fixture(scope="module")
def settings(make_settings):
    loss = {"kind": "jsd", "beta": 0.3}
    return make_settings(steps=STEPS, loss=loss, task_weight=0.25, on_policy=WRITE)


@pytest.fixture(scope="module")
def whole(settings, student, teacher, tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return distill(settings(), student=student, teacher=teacher, out=out)


# --- the draw and the sampling ------------------------------------------------------------------


def test_the_share_of_steps_is_drawn_by_step_and_seed_alone():
    wanted = OnPolicy(share=0.3)
    drawn = [wanted.draws(step, 7) for step in range(4000)]
    assert np.mean(drawn) == pytest.approx(0.3, abs=0.03)
    assert drawn == [OnPolicy(share=0.3).draws(step, 7) for step in range(4000)]
    assert drawn != [wanted.draws(step, 8) for step in range(4000)]
    assert all(OnPolicy(share=1.0).draws(step, 7) for step in range(100))


def test_every_batch_is_sampled_with_a_seed_of_its_own():
    seeds = [
        OnPolicy().seed_of(step, seed, batch)
        for step in range(4)
        for seed in range(3)
        for batch in range(6)
    ]
    assert len(set(seeds)) == len(seeds)


def test_labels_end_with_the_token_that_ends_the_text():
    from trt_kd.training.rollout import written

    tokens = torch.tensor([[5, 0, 7, 0, 0, 0], [5, 6, 7, 8, 9, 3], [5, 6, 0, 4, 4, 4]])
    labels = written(tokens, 2, [0, 3])
    wanted = [
        [-100, -100, 7, 0, -100, -100],
        [-100, -100, 7, 8, 9, 3],
        [-100, -100, 0] + [-100] * 3,
    ]
    assert labels.tolist() == wanted
    assert written(tokens, 2, [])[:, 2:].tolist() == tokens[:, 2:].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_student_writes_what_its_distribution_says_and_is_left_as_it_was(
    make_model, temperature
):
    from trt_kd.training.rollout import Rollout

    model = make_model(vocab_size=16, num_hidden_layers=2).train()
    wanted = OnPolicy(share=1.0, prompt_tokens=3, new_tokens=1, temperature=temperature)
    rollout = Rollout(wanted, seed=0, ends=[], precision="fp32")
    prompts = torch.tensor([[3, 1, 4, 1]]).expand(4000, -1)
    state, settings = torch.get_rng_state(), model.generation_config
    made = rollout.batch(model, {"input_ids": prompts}, step=0, number=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.generation_config is settings

    with torch.no_grad():
        p = (model.eval()(prompts[:1, :3]).logits[0, -1] / temperature).softmax(-1)
    found = torch.bincount(made["input_ids"][:, 3], minlength=16) / 4000
    assert ((found - p).abs() <= 5 * (p * (1 - p) / 4000).sqrt() + 1e-4).all()


# --- what is learnt -----------------------------------------------------------------------------


def first_step(config, student):
    """What the untrained student writes in the first step, batch by batch."""
    from trt_kd.training.rollout import Rollout

    model, tokenizer = load_model(student.path), load_tokenizer(student.path)
    count = config.batch_size * config.gradient_accumulation
    blocks = token_blocks(config.data, tokenizer, split="train", count=count, seed=config.seed)
    rollout = Rollout(config.on_policy, config.seed, [0], "fp32")
    parts = torch.from_numpy(np.array(blocks)).split(config.batch_size)
    return [rollout.batch(model, {"input_ids": part}, 0, n) for n, part in enumerate(parts)]


def valid_logits(path, batches):
    """Logits at the student's own tokens, one row for each."""
    model = load_model(path)
    with torch.no_grad():
        return torch.cat(
            [
                model(batch["input_ids"]).logits[:, :-1][batch["labels"][:, 1:] != -100]
                for batch in batches
            ]
        )


@pytest.fixture(scope="module")
def alone(settings, student, teacher, tmp_path_factory):
    """A run whose every step the student writes, in two passes, with its settings."""
    config = settings(
        on_policy=WRITE | {"share": 1.0}, task_weight=0, gradient_accumulation=2, steps=3
    )
    out = tmp_path_factory.mktemp("alone") / "out"
    return config, distill(config, student=student, teacher=teacher, out=out)


def test_the_first_loss_is_that_of_the_formula_on_the_students_own_tokens(
    alone, student, teacher, log_of
):
    config, artifact = alone
    batches = first_step(config, student)
    q, p = (valid_logits(one.path, batches).softmax(-1) for one in (student, teacher))
    beta = config.loss.beta
    m = beta * p + (1 - beta) * q
    divergence = beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()
    row = log_of(artifact)[0]
    assert row["response_nats_per_token"] == pytest.approx(divergence.item() / len(q), rel=1e-4)
    assert row["loss_nats_per_token"] == row["response_nats_per_token"]
    assert "task_nats_per_token" not in row
    assert row["generated_tokens"] == pytest.approx(len(q) / 4)


def test_the_first_loss_is_that_of_trl(alone, student, teacher, log_of):
    gkd = pytest.importorskip("trl.experimental.gkd")
    config, artifact = alone
    batches = first_step(config, student)
    q, p = (valid_logits(one.path, batches) for one in (student, teacher))
    theirs = gkd.GKDTrainer.generalized_jsd_loss(q[None], p[None], beta=config.loss.beta)
    found = log_of(artifact)[0]["response_nats_per_token"] * len(q)
    assert found == pytest.approx(theirs.item(), rel=1e-4)  # "batchmean" over a batch of one


def test_steps_on_text_and_on_own_text_follow_the_draw(whole, settings, log_of):
    config = settings()
    drawn = [config.on_policy.draws(step, config.seed) for step in range(STEPS)]
    assert set(drawn) == {True, False}
    rows = log_of(whole)
    assert ["generated_tokens" in row for row in rows] == drawn
    assert ["task_nats_per_token" not in row for row in rows] == drawn
    assert all(1 <= row["generated_tokens"] <= 12 for row in rows if "generated_tokens" in row)


def test_steps_on_text_are_those_of_a_run_without_own_text(
    whole, settings, student, teacher, tmp_path, log_of
):
    plain = distill(settings(on_policy=None), student=student, teacher=teacher, out=tmp_path / "o")
    first = log_of(whole)[0]
    assert ("generated_tokens" in first) == settings().on_policy.draws(0, 0)
    if "generated_tokens" not in first:
        assert first == log_of(plain)[0]
    ours, theirs = (load_file(one.path / "model.safetensors") for one in (whole, plain))
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_student_comes_closer_on_its_own_text(settings, student, teacher, tmp_path, log_of):
    config = settings(
        on_policy=WRITE | {"share": 1.0},
        task_weight=0,
        steps=12,
        batch_size=4,
        precision="bf16",
        learning_rate=4e-3,
    )
    made = distill(config, student=student, teacher=teacher, out=tmp_path / "out")
    losses = [row["response_nats_per_token"] for row in log_of(made)]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:3])


# --- how it survives ----------------------------------------------------------------------------


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def run(settings, roles, out):
    return partial(distill, settings(), **roles, out=out)


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_cut_off_ends_as_if_it_had_not_been(run, whole, out, step, assert_same_run, cut_off):
    cut_off(run, step)
    found = [path.name for path in (work_directory(out) / "checkpoints").glob("*")]
    assert found == (["checkpoint-2"] if step > 2 else [])
    assert_same_run(run(), whole)


# --- what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {"kind": "cached"}}, "cached teacher has not read.*teacher: online"),
        ({"loss": "dkd"}, "dkd needs the true next tokens"),
        ({"loss": "mft"}, "mft needs the true next tokens"),
        ({"response_weight": 0}, "only a teacher can judge"),
        ({"packing": {"reset": True}}, "leave packing.reset out"),
        ({"sharding": "fsdp2"}, "write sharding: none, not fsdp2"),
        ({"on_policy": WRITE | {"prompt_tokens": 33}}, "33 must be at most data.block_tokens 32"),
        ({"on_policy": WRITE | {"share": 0.001}}, "draws none of 6 steps"),
        ({"on_policy": WRITE | {"share": 1.0}}, "task_weight has no effect"),
        ({"on_policy": WRITE | {"share": 0.0}}, "greater than 0"),
        (
            {"response_weight": {"kind": "linear", "start": 1.0, "end": 0.0}, "seed": 3,
             "on_policy": WRITE | {"share": 0.95}},
            "0 at a step at which the student writes",
        ),
        ({"on_policy": None, "stop_on": ["length_drift"]}, "the run has no on_policy"),
    ],
)  # fmt: skip
def test_settings_without_sense_or_effect_are_refused(settings, changes, message):
    with pytest.raises(ValidationError, match=message):
        settings(**changes)


def test_more_tokens_than_the_models_can_read_are_refused(
    settings, student, teacher, tmp_path, monkeypatch
):
    monkeypatch.setattr("trt_kd.stages.distill.load_model", None)
    config = settings(on_policy=WRITE | {"new_tokens": 600})
    with pytest.raises(ConfigError, match="more than the context of 512") as raised:
        distill(config, student=student, teacher=teacher, out=tmp_path / "out")
    assert raised.value.hint == "lower one of them"


def test_a_rehearsal_writes_and_the_control_does_not(settings):
    assert settings().rehearsal().on_policy == OnPolicy(share=1.0, prompt_tokens=1, new_tokens=4)
    assert settings().cross_entropy().on_policy is None
