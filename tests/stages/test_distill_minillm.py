"""Distillation by MiniLLM's policy gradient: what is sampled and learnt, that it survives."""

from functools import partial

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from trt_kd.checkpoints import load_model, load_tokenizer
from trt_kd.data.base import token_blocks
from trt_kd.stages.distill import distill
from trt_kd.training.on_policy import OnPolicy

pytestmark = pytest.mark.usefixtures("modelopt")

POLICY = {"teacher_mix": 0.3}
WRITE = {"share": 1.0, "prompt_tokens": 8, "new_tokens": 6, "policy_gradient": POLICY}


@pytest.fixture(scope="module")
def student(make_student):
    return make_student(noise=0.05)


@pytest.fixture(scope="module")
def settings(make_settings):
    return make_settings(loss="reverse_kl", on_policy=WRITE)


@pytest.fixture(scope="module")
def whole(settings, roles, tmp_path_factory):
    """A run that nothing interrupted."""
    return distill(settings(), **roles, out=tmp_path_factory.mktemp("whole") / "out")


# --- what is sampled ----------------------------------------------------------------------------


@pytest.mark.parametrize("known", [6, 8, 11])
def test_text_is_sampled_from_the_mixture_of_student_and_teacher(make_model, known):
    """Whichever of the two has the larger vocabulary; what the teacher lacks is not written."""
    from trt_kd.training.rollout import Rollout

    model = make_model(vocab_size=8, num_hidden_layers=2)
    other = make_model(seed=5, vocab_size=known, num_hidden_layers=2)
    wanted = OnPolicy(prompt_tokens=2, new_tokens=2, policy_gradient={"teacher_mix": 0.4})
    rollout = Rollout(wanted, seed=0, ends=[], precision="fp32", known=known)
    prompts = torch.tensor([[3, 1]]).expand(6000, -1)
    made = rollout.batch(model, {"input_ids": prompts}, 0, 0, teacher=other)["input_ids"]
    both = min(8, known)

    def mixture(text):
        with torch.no_grad():
            q, p = (one(torch.tensor([text])).logits[0, -1] for one in (model, other))
        return 0.4 * p[:both].softmax(-1) + 0.6 * q[:both].softmax(-1)

    first = mixture([3, 1])
    expected = torch.stack([first[token] * mixture([3, 1, token]) for token in range(both)])
    found = torch.zeros(8, 8).index_put_(
        (made[:, 2], made[:, 3]), torch.tensor(1 / 6000), accumulate=True
    )
    gap = (found[:both, :both] - expected).abs()
    assert (gap <= 5 * (expected / 6000).sqrt() + 1e-4).all()
    assert found[:both, :both].sum() == pytest.approx(1.0, rel=1e-4)


# --- what is learnt -----------------------------------------------------------------------------


def first_step(config, roles):
    """The batch that the untrained student and the teacher write in the first step."""
    from trt_kd.training.rollout import Rollout

    student, teacher = (load_model(roles[name].path) for name in ("student", "teacher"))
    tokenizer = load_tokenizer(roles["student"].path)
    blocks = token_blocks(config.data, tokenizer, split="train", count=2, seed=config.seed)
    rollout = Rollout(config.on_policy, config.seed, [0], "fp32")
    batch = {"input_ids": torch.from_numpy(np.array(blocks))}
    mixed = teacher if rollout.teacher_mix else None
    return student, teacher, rollout.batch(student, batch, 0, 0, teacher=mixed)


@pytest.mark.parametrize(
    "policy",
    [
        POLICY,
        {"teacher_mix": 0.0, "length_normalised": False},
        {"teacher_mix": 0.3, "single_step": False},
    ],
)
def test_the_first_step_is_that_of_the_formula(settings, roles, tmp_path, policy, log_of):
    """Value and gradient norm, with the formula as written in the paper and plain autograd."""
    config = settings(steps=1, on_policy=WRITE | {"policy_gradient": policy})
    row = log_of(distill(config, **roles, out=tmp_path / "out"))[0]
    student, teacher, batch = first_step(config, roles)
    options = config.on_policy.policy_gradient
    log_q = student(batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    with torch.no_grad():
        log_p = teacher(batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    total, value, weights, count = 0.0, 0.0, 0.0, 0
    for n, labels in enumerate(batch["labels"][:, 1:].tolist()):
        places = [k for k, token in enumerate(labels) if token != -100]
        gains = [(log_p[n, k, labels[k]] - log_q[n, k, labels[k]]).item() for k in places]
        for i, k in enumerate(places):
            q, p = log_q[n, k, labels[k]].exp().item(), log_p[n, k, labels[k]].exp().item()
            weight = q / (options.teacher_mix * p + (1 - options.teacher_mix) * q)
            ahead = gains[i + options.single_step :]
            outlook = sum(ahead)
            if options.length_normalised and ahead:
                outlook /= len(ahead)
            own = (log_q[n, k].exp() * (log_q[n, k] - log_p[n, k])).sum()
            if not options.single_step:
                own = torch.tensor(-gains[i])
            value += weight * own.item()
            total = total - weight * outlook * log_q[n, k, labels[k]]
            if options.single_step:
                total = total + weight * own
            weights += weight
            count += 1
    gradients = torch.autograd.grad(total / count, [*student.parameters()])
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    assert row["response_nats_per_token"] == pytest.approx(value / count, rel=1e-3)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    assert row["generated_tokens"] == pytest.approx(count / 2)
    if options.teacher_mix:
        assert row["importance_weight"] == pytest.approx(weights / count, rel=1e-4)
    else:
        assert "importance_weight" not in row


def test_steps_on_text_take_the_loss_and_the_task(settings, roles, tmp_path, log_of):
    config = settings(
        steps=6, on_policy=WRITE | {"share": 0.5}, loss="dkd", task_weight=0.5, seed=2
    )
    drawn = [config.on_policy.draws(step, config.seed) for step in range(6)]
    assert set(drawn) == {True, False}
    rows = log_of(distill(config, **roles, out=tmp_path / "out"))
    assert ["generated_tokens" in row for row in rows] == drawn
    assert ["task_nats_per_token" not in row for row in rows] == drawn


def test_the_student_comes_closer_to_the_teacher(settings, roles, tmp_path, log_of):
    config = settings(
        steps=16,
        batch_size=16,
        precision="bf16",
        learning_rate=4e-3,
        on_policy=WRITE | {"new_tokens": 12},
    )
    losses = [
        row["response_nats_per_token"]
        for row in log_of(distill(config, **roles, out=tmp_path / "out"))
    ]
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:3])


# --- how it survives ----------------------------------------------------------------------------


def test_a_run_cut_off_ends_as_if_it_had_not_been(
    whole, settings, roles, tmp_path, assert_same_run, cut_off
):
    run = partial(distill, settings(), **roles, out=tmp_path / "out")
    cut_off(run, 4)
    assert_same_run(run(), whole)


# --- what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "forward_kl"}, "write loss: reverse_kl"),
        ({"loss": {"kind": "reverse_kl", "temperature": 2.0}}, "write loss: reverse_kl"),
        ({"on_policy": WRITE | {"temperature": 0.7}}, "temperature 0.7 and top_p 1 must both be 1"),
        ({"on_policy": WRITE | {"top_p": 0.9}}, "temperature 1 and top_p 0.9 must both be 1"),
        ({"on_policy": WRITE | {"new_tokens": 1}}, "no effect where new_tokens is 1"),
        (
            {"on_policy": WRITE | {"policy_gradient": {"teacher_mix": 1.0}}},
            "less than 1",
        ),
        (
            {"teacher": {"kind": "several", "others": ["elsewhere"]}},
            "takes one teacher in every step, not several",
        ),
        ({"task_weight": 0.5}, "task_weight has no effect"),
    ],
)  # fmt: skip
def test_settings_without_sense_or_effect_are_refused(settings, changes, message):
    with pytest.raises(ValidationError, match=message):
        settings(**changes)


def test_a_rehearsal_keeps_the_policy_gradient(settings):
    assert settings().rehearsal().on_policy == OnPolicy(
        share=1.0, prompt_tokens=1, new_tokens=4, policy_gradient=POLICY
    )
