"""Terms weighed by the norms of their gradients: against plain autograd, kept, and refused."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from trt_kd.checkpoints import load_model, load_tokenizer
from trt_kd.data.base import token_blocks
from trt_kd.stages.distill import distill
from trt_kd.training.balance import Balance

pytestmark = pytest.mark.usefixtures("modelopt")

MSE = {"loss": "mse", "pairs": [[1, 1], [2, 0]], "weight": 0.25}
VALUES = {"loss": {"kind": "minilm", "relations": ["values"], "heads": 4}, "pairs": [[0, 0]]}


@pytest.fixture(scope="module")
def student(make_student):
    return make_student(noise=0.03)


@pytest.fixture(scope="module")
def settings(make_settings):
    return make_settings(data={"block_tokens": 16}, task_weight=0.5, balance={"every_steps": 2})


def plain_terms(config, roles):
    """The terms' sums in the first pass, written plainly, and the student's states by layer."""
    student, teacher = (load_model(roles[name].path) for name in ("student", "teacher"))
    tokenizer = load_tokenizer(roles["student"].path)
    blocks = token_blocks(config.data, tokenizer, split="train", count=2, seed=config.seed)
    tokens = torch.from_numpy(np.array(blocks))
    with torch.no_grad():
        wanted = teacher(tokens, output_hidden_states=True)
    last = []
    student.lm_head.register_forward_pre_hook(lambda _module, inputs: last.append(inputs[0]))
    made = student(tokens, output_hidden_states=True)
    log_q, log_p = (x.logits[:, :-1].log_softmax(-1) for x in (made, wanted))
    terms = {
        "response": (log_p.exp() * (log_p - log_q)).sum(),
        "task": F.cross_entropy(made.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(),
                                reduction="sum"),
    }  # fmt: skip
    for one, other in [(1, 1), (2, 0)]:
        apart = made.hidden_states[one + 1] - wanted.hidden_states[other + 1]
        terms[f"feature_mse_{one}_{other}"] = apart[:, :-1].square().mean(-1).sum()
    return student, terms, [*made.hidden_states[:-1], last[0]]


def norm(gradients):
    return torch.stack([g.norm() for g in gradients if g is not None]).norm().item()


@pytest.mark.parametrize(("features", "place"), [([], -1), ([MSE], 2), ([MSE, VALUES], 0)])
def test_the_first_step_has_norms_weights_and_gradient_of_plain_autograd(
    settings, roles, tmp_path, features, place, log_of
):
    """Shared are the last hidden states, the lowest layer read, or what its attention reads."""
    config = settings(*features, steps=1)
    row = log_of(distill(config, **roles, out=tmp_path / "out"))[0]
    student, terms, states = plain_terms(config, roles)
    if not features:
        terms = {name: terms[name] for name in ("response", "task")}
    norms = {
        name: norm(torch.autograd.grad(value, states[place], retain_graph=True))
        for name, value in terms.items()
    }
    asked = dict.fromkeys(terms, 0.25) | {"response": 1.0, "task": 0.5}
    weights = {name: asked[name] * norms["response"] / norms[name] for name in terms}
    for name in terms:
        assert row[f"balanced_norm_{name}"] == pytest.approx(norms[name], rel=1e-4)
        assert row[f"balanced_weight_{name}"] == pytest.approx(weights[name], rel=1e-4)
    if VALUES not in features:
        total = sum(weights[name] * terms[name] for name in terms) / 30
        found = norm(torch.autograd.grad(total, [*student.parameters()], allow_unused=True))
        assert row["grad_norm"] == pytest.approx(found, rel=1e-3)
        assert row["loss_nats_per_token"] == pytest.approx(total.item(), rel=1e-4)


def test_norms_are_measured_on_their_steps_and_when_a_term_joins(settings, roles, tmp_path, log_of):
    rise = {"kind": "linear", "start": 0.0, "end": 0.5}
    config = settings(MSE, balance={"every_steps": 3, "decay": 0.5}, steps=7, task_weight=rise)
    rows = log_of(distill(config, **roles, out=tmp_path / "out"))
    assert "balanced_norm_task" not in rows[0]
    response, task = ([row.get(f"balanced_norm_{name}") for row in rows]
                      for name in ("response", "task"))  # fmt: skip
    changed = [a != b for a, b in pairwise(response)]
    assert changed == [True, False, True, False, False, True]  # new at 1; in turn at 3 and 6
    assert task[1] == task[2] != task[3]
    for row in rows[1:]:
        ratio = row["balanced_weight_task"] * row["balanced_norm_task"]
        assert ratio == pytest.approx(row["task_weight"] * row["balanced_norm_response"])


def test_a_run_cut_off_ends_as_if_it_had_not_been(
    settings, roles, tmp_path, assert_same_run, cut_off
):
    config = settings(MSE, gradient_accumulation=2)
    whole = distill(config, **roles, out=tmp_path / "whole")
    run = partial(distill, config, **roles, out=tmp_path / "out")
    cut_off(run, 4)
    assert_same_run(run(), whole)


def test_a_stage_of_features_alone_is_measured_by_its_first_feature(
    settings, roles, tmp_path, log_of
):
    alone = MSE | {"until_step": 2, "alone": True}
    rows = log_of(distill(settings(alone), **roles, out=tmp_path / "out"))
    for row in rows[:2]:
        assert row["balanced_weight_feature_mse_1_1"] == 0.25
        assert "balanced_weight_response" not in row
    assert rows[2]["balanced_weight_response"] == 1.0
    assert "balanced_weight_feature_mse_1_1" not in rows[2]


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_mean_runs_and_what_has_no_gradient_keeps_its_weight(decay):
    from trt_kd.training.balancing import Balancer

    made = Balancer(Balance(decay=decay))
    made.take({"response": 2.0, "task": 8.0, "late": 0.0})
    made.take({"response": 4.0, "task": 8.0, "late": 0.0})
    mean = 2.0 * decay + 4.0 * (1 - decay)
    assert made.means == pytest.approx({"response": mean, "task": 8.0})
    found = made.weights({"response": 0.5, "task": 2.0, "late": 3.0})
    assert found == pytest.approx({"response": 0.5, "task": 2.0 * mean / 8.0, "late": 3.0})
    assert made.weights({"late": 3.0}) == {"late": 3.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_weight": 0.0}, "balance: no effect: there is a single term"),
        (
            {"on_policy": {"prompt_tokens": 8, "share": 0.9}},
            "text has gradients of another size",
        ),
        ({"sharding": "fsdp2"}, "write sharding: none, not fsdp2"),
        ({"gradient_checkpointing": True}, "leave gradient_checkpointing out"),
        ({"balance": {"decay": 1.0}}, "less than 1"),
    ],
)
def test_settings_without_sense_or_effect_are_refused(settings, changes, message):
    with pytest.raises(ValidationError, match=message):
        settings(**changes)


def test_a_rehearsal_measures_at_once_and_the_control_has_one_term(settings):
    assert settings().rehearsal().balance == Balance(every_steps=1)
    assert settings().cross_entropy().balance is None
