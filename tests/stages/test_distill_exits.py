"""Layers that learn from the student's own output: against plain autograd, and what is refused."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from trt_kd.checkpoints import load_model, load_tokenizer
from trt_kd.data.base import token_blocks
from trt_kd.errors import ConfigError
from trt_kd.stages.distill import distill
from trt_kd.training.exits import Exits

EXITS = {"layers": [0, 2], "weight": 0.3}


@pytest.fixture(scope="module")
def student(make_student):
    return make_student(noise=0.03)


@pytest.fixture(scope="module")
def settings(make_settings):
    return make_settings(data={"block_tokens": 16}, steps=3, exits=EXITS)


def norm(gradients):
    return torch.stack([g.norm() for g in gradients if g is not None]).norm().item()


@pytest.mark.parametrize("balance", [None, {}])
def test_the_first_step_is_that_of_plain_autograd_without_a_gradient_into_the_output(
    settings, roles, tmp_path, balance, log_of
):
    config = settings(steps=1, balance=balance)
    row = log_of(distill(config, **roles, out=tmp_path / "out"))[0]
    student, teacher = (load_model(roles[name].path) for name in ("student", "teacher"))
    tokenizer = load_tokenizer(roles["student"].path)
    blocks = token_blocks(config.data, tokenizer, split="train", count=2, seed=config.seed)
    tokens = torch.from_numpy(np.array(blocks))
    made = student(tokens, output_hidden_states=True)
    with torch.no_grad():
        p = teacher(tokens).logits[:, :-1].log_softmax(-1)
    q = made.logits[:, :-1].log_softmax(-1)

    def divergence(log_q, log_p):
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True)

    terms = {"response": divergence(q, p)}
    for layer in EXITS["layers"]:
        left = student.lm_head(student.model.norm(made.hidden_states[layer + 1]))
        value = divergence(left[:, :-1].log_softmax(-1), q.detach())
        terms[f"exit_{layer}_nats_per_token"] = value
    shared = made.hidden_states[1]  # what layer 0 says, on which all depend
    norms = {
        name: norm(torch.autograd.grad(value, shared, retain_graph=True))
        for name, value in terms.items()
    }
    factors = {
        name: 1.0
        if name == "response"
        else 0.3 * (norms["response"] / norms[name] if balance is not None else 1.0)
        for name in terms
    }
    total = sum(factors[name] * value for name, value in terms.items()) / 30
    gradients = torch.autograd.grad(total, [*student.parameters()])
    for name in list(terms)[1:]:
        assert row[name] == pytest.approx(terms[name].item() / 30, rel=1e-4)
    assert row["loss_nats_per_token"] == pytest.approx(total.item(), rel=1e-4)
    assert row["grad_norm"] == pytest.approx(norm(gradients), rel=1e-3)
    if balance is not None:
        for name in terms:
            assert row[f"balanced_norm_{name}"] == pytest.approx(norms[name], rel=1e-4)


def test_exits_come_closer_and_nothing_of_them_is_written(
    settings, roles, tmp_path, log_of, weights_of
):
    config = settings(steps=25, exits={"layers": [1], "weight": 1.0}, learning_rate=3e-3)
    made = distill(config, **roles, out=tmp_path / "out")
    values = [row["exit_1_nats_per_token"] for row in log_of(made)]
    assert np.mean(values[-5:]) < 0.7 * np.mean(values[:3])
    assert made.metrics["exit_1_nats_per_token"] == pytest.approx(np.mean(values[-10:]))
    assert weights_of(made).keys() == weights_of(roles["student"]).keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"batch_size": 1, "gradient_accumulation": 2},
    ],
)
def test_what_saves_memory_changes_nothing(settings, roles, tmp_path, changes, log_of, weights_of):
    plain = distill(settings(), **roles, out=tmp_path / "plain")
    saved = distill(settings(**changes), **roles, out=tmp_path / "saved")
    torch.testing.assert_close(weights_of(saved), weights_of(plain), rtol=1e-4, atol=1e-5)
    for row, expected in zip(log_of(saved), log_of(plain), strict=True):
        assert row == pytest.approx(expected, rel=1e-3)


def test_exits_learn_from_hard_labels_own_text_and_beside_features(
    settings, roles, tmp_path, log_of
):
    alone = {"loss": "mse", "pairs": [[0, 0]], "until_step": 1, "alone": True}
    config = settings(
        features=[alone],
        on_policy={"share": 0.6, "prompt_tokens": 4, "new_tokens": 4},
        exits=EXITS | {"weight": {"kind": "linear", "end": 0.5}, "loss": "reverse_kl"},
        precision="bf16",
    )
    rows = log_of(distill(config, **roles, out=tmp_path / "out"))
    assert ["exit_0_nats_per_token" in row for row in rows] == [False, True, True]
    hard = settings(response_weight=0.0, task_weight=1.0)
    rows = log_of(distill(hard, student=roles["student"], out=tmp_path / "hard"))
    assert all(row["exit_2_nats_per_token"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exits": {"layers": []}}, "at least 1 item"),
        ({"exits": {"layers": [1, 1]}}, "a layer stands twice"),
        ({"exits": EXITS | {"weight": 0}}, "weight 0 has no effect"),
        ({"exits": EXITS | {"loss": "dkd"}}, "dkd needs the true next tokens"),
        ({"exits": EXITS | {"weight": {"kind": "linear", "end": 1.0, "steps": 9}}},
         "exits.weight.steps 9 must be at most steps 3"),
        ({"sharding": "fsdp2"}, "write sharding: none, not fsdp2"),
    ],
)  # fmt: skip
def test_settings_without_sense_or_effect_are_refused(settings, changes, message):
    with pytest.raises(ValidationError, match=message):
        settings(**changes)


def test_an_exit_that_nothing_follows_is_refused_before_a_model_is_loaded(
    settings, roles, tmp_path, monkeypatch
):
    monkeypatch.setattr("trt_kd.stages.distill.load_model", None)
    config = settings(exits={"layers": [1, 3]})
    with pytest.raises(ConfigError, match="nothing follows layer 3 of the student") as raised:
        distill(config, **roles, out=tmp_path / "out")
    assert raised.value.hint == "give layers from 0 to 2"


def test_a_rehearsal_leaves_after_the_first_layer_and_the_control_nowhere(settings):
    assert settings().rehearsal().exits == Exits(layers=[0], weight=0.3)
    assert settings().cross_entropy().exits is None
