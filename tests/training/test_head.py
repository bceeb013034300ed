"""The piecewise vocabulary part gives what plain autograd gives."""

import pytest
import torch
from torch.nn import functional as F

from trt_kd.errors import ModelError
from trt_kd.losses import LOSSES
from trt_kd.losses.jsd import JensenShannon
from trt_kd.losses.kl import ForwardKL, ReverseKL
from trt_kd.losses.top_k import top_k_of
from trt_kd.teachers.forward import check_linear_head
from trt_kd.training import head as head_module
from trt_kd.training.head import Head, Labels, Objective, head_loss

TOKENS, HIDDEN, VOCABULARY = 13, 8, 29
REGISTERED = [LOSSES.load(name)() for name in LOSSES.names()]


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "hidden": random(TOKENS, HIDDEN).requires_grad_(),
        "weight": random(VOCABULARY, HIDDEN).requires_grad_(),
        "bias": random(VOCABULARY).requires_grad_(),
        "teacher": 2 * random(TOKENS, VOCABULARY),
        "labels": torch.arange(TOKENS),
    }


def gradients(rows):
    return [rows[name].grad.clone() for name in ("hidden", "weight", "bias")]


def test_a_graph_that_is_kept_gives_the_same_gradients_again(rows):
    total, _, _ = head_loss(
        Objective(ForwardKL(), 0.3, 0.7),
        rows["hidden"],
        Head(rows["weight"], rows["bias"]),
        Labels(rows["labels"]),
        teacher=lambda piece: rows["teacher"][piece],
        dtype=torch.float64,
    )
    leaves = [rows[name] for name in ("hidden", "weight", "bias")]
    first = torch.autograd.grad(total / 3, leaves, retain_graph=True)
    kept = [one.clone() for one in first]
    again = torch.autograd.grad(2 * total, leaves, retain_graph=True)
    last = torch.autograd.grad(total, leaves)
    torch.testing.assert_close(list(first), kept, rtol=0, atol=0)
    torch.testing.assert_close([one / 6 for one in again], kept)
    torch.testing.assert_close([one / 3 for one in last], kept)


def clear(rows):
    for name in ("hidden", "weight", "bias"):
        rows[name].grad = None


@pytest.mark.parametrize("loss", [ForwardKL(temperature=2.0), *REGISTERED], ids=lambda x: x.kind)
@pytest.mark.parametrize("terms", [(0.0, 1.0), (1.0, 0.0), (0.3, 0.7)])
@pytest.mark.parametrize("sizes", [(1 << 20, 1 << 20), (5, 2), (1, 1)])
def test_value_and_gradients_are_those_of_plain_autograd(rows, loss, terms, sizes, monkeypatch):
    (task_weight, response_weight), (group, piece) = terms, sizes
    monkeypatch.setattr(head_module, "GROUP_BYTES", {"cpu": group * 8 * VOCABULARY})
    monkeypatch.setattr(head_module, "ROWS_BYTES", {"cpu": piece * 4 * VOCABULARY})
    objective = Objective(loss, task_weight, response_weight, label_smoothing=0.1)

    total, task, response = head_loss(
        objective,
        rows["hidden"],
        Head(rows["weight"], rows["bias"]),
        Labels(rows["labels"]),
        teacher=lambda piece: rows["teacher"][piece],
        dtype=torch.float64,
    )
    (total / 3).backward()
    found = gradients(rows)
    clear(rows)

    logits = F.linear(rows["hidden"], rows["weight"], rows["bias"])
    mask = torch.ones(TOKENS, dtype=torch.bool)
    plain_task = F.cross_entropy(logits, rows["labels"], reduction="sum", label_smoothing=0.1)
    plain_response = loss(logits, rows["teacher"], mask, rows["labels"])
    plain = task_weight * plain_task + response_weight * plain_response
    (plain / 3).backward()

    torch.testing.assert_close(total, plain.detach())
    torch.testing.assert_close(task, plain_task.detach() * bool(task_weight))
    torch.testing.assert_close(response, plain_response.detach() * bool(response_weight))
    torch.testing.assert_close(found, gradients(rows))


@pytest.mark.parametrize("sizes", [(1 << 20, 1 << 20), (5, 2), (1, 1)])
def test_weights_are_those_of_the_task_term_alone(rows, sizes, monkeypatch):
    group, piece = sizes
    monkeypatch.setattr(head_module, "GROUP_BYTES", {"cpu": group * 8 * VOCABULARY})
    monkeypatch.setattr(head_module, "ROWS_BYTES", {"cpu": piece * 4 * VOCABULARY})
    weights = torch.linspace(0.0, 2.0, TOKENS, dtype=torch.float64)
    total, task, _ = head_loss(
        Objective(ForwardKL(), 0.3, 0.7),
        rows["hidden"],
        Head(rows["weight"], rows["bias"]),
        Labels(rows["labels"], weights),
        teacher=lambda piece: rows["teacher"][piece],
        dtype=torch.float64,
    )
    total.backward()
    found = gradients(rows)
    clear(rows)
    logits = F.linear(rows["hidden"], rows["weight"], rows["bias"])
    mask = torch.ones(TOKENS, dtype=torch.bool)
    each = F.cross_entropy(logits, rows["labels"], reduction="none")
    plain = 0.3 * (weights * each).sum() + 0.7 * ForwardKL()(logits, rows["teacher"], mask)
    plain.backward()
    torch.testing.assert_close(total, plain.detach())
    torch.testing.assert_close(task, (weights * each).sum().detach())
    torch.testing.assert_close(found, gradients(rows))


@pytest.mark.parametrize("terms", [(0.0, 1.0), (0.3, 0.7)])
@pytest.mark.parametrize("sizes", [(1 << 20, 1 << 20), (5, 2), (1, 1)])
def test_tasks_have_sums_of_their_own_and_change_nothing_else(rows, terms, sizes, monkeypatch):
    group, piece = sizes
    monkeypatch.setattr(head_module, "GROUP_BYTES", {"cpu": group * 8 * VOCABULARY})
    monkeypatch.setattr(head_module, "ROWS_BYTES", {"cpu": piece * 4 * VOCABULARY})
    weights = torch.linspace(0.5, 2.0, TOKENS, dtype=torch.float64)
    tasks = torch.arange(TOKENS, dtype=torch.int8) % 3 + 1
    found = []
    for labels in (
        Labels(rows["labels"], weights),
        Labels(rows["labels"], weights, tasks, task_count=4),
    ):
        total, task, response = head_loss(
            Objective(ForwardKL(), *terms),
            rows["hidden"],
            Head(rows["weight"], rows["bias"]),
            labels,
            teacher=lambda piece: rows["teacher"][piece],
            dtype=torch.float64,
        )
        total.backward()
        found.append((total.detach(), task.sum(), response, *gradients(rows)))
        clear(rows)
    torch.testing.assert_close(*found)
    logits = F.linear(rows["hidden"], rows["weight"], rows["bias"]).detach()
    each = weights * F.cross_entropy(logits, rows["labels"], reduction="none")
    apart = torch.stack([each[tasks == number].sum() for number in (1, 2, 3, 4)])
    torch.testing.assert_close(task, apart * bool(terms[0]))


@pytest.mark.parametrize("loss", [ForwardKL(), ReverseKL(), JensenShannon()])
@pytest.mark.parametrize("terms", [(0.0, 1.0), (0.3, 0.7)])
@pytest.mark.parametrize("sizes", [(1 << 20, 1 << 20), (5, 2), (1, 1)])
def test_a_teacher_of_few_tokens_gives_the_bucketed_loss_of_plain_autograd(
    rows, loss, terms, sizes, monkeypatch
):
    (task_weight, response_weight), (group, piece) = terms, sizes
    monkeypatch.setattr(head_module, "GROUP_BYTES", {"cpu": group * 8 * VOCABULARY})
    monkeypatch.setattr(head_module, "ROWS_BYTES", {"cpu": piece * 4 * VOCABULARY})
    top = top_k_of(rows["teacher"], 6)
    total, _, response = head_loss(
        Objective(loss, task_weight, response_weight),
        rows["hidden"],
        Head(rows["weight"], rows["bias"]),
        Labels(rows["labels"]),
        teacher=top.__getitem__,
        dtype=torch.float64,
    )
    (total / 3).backward()
    found = gradients(rows)
    clear(rows)

    logits = F.linear(rows["hidden"], rows["weight"], rows["bias"])
    logp = logits.log_softmax(-1)
    rest = logp.scatter(-1, top.ids, -torch.inf).logsumexp(-1, keepdim=True)
    student = torch.cat((logp.gather(-1, top.ids), rest), -1)
    teacher = torch.cat((top.logp, top.tail[:, None]), -1)
    plain_response = loss(student, teacher, torch.ones(TOKENS, dtype=torch.bool))
    plain_task = F.cross_entropy(logits, rows["labels"], reduction="sum")
    ((task_weight * plain_task + response_weight * plain_response) / 3).backward()
    torch.testing.assert_close(response, plain_response.detach())
    torch.testing.assert_close(found, gradients(rows))


def test_a_response_term_without_a_teacher_is_an_error(rows):
    with pytest.raises(ValueError, match="teacher's rows"):
        Objective(ForwardKL(), 0.0, 1.0).parts(rows["teacher"], None, Labels(rows["labels"]))


def test_a_bf16_head_comes_close_to_a_float32_one(rows):
    objective = Objective(ForwardKL(), 0.5, 0.5)
    single = {
        name: value.detach().float() if value.is_floating_point() else value
        for name, value in rows.items()
    }
    values = [
        head_loss(
            objective,
            single["hidden"].clone().requires_grad_(),
            Head(single["weight"]),
            Labels(single["labels"]),
            teacher=lambda piece: single["teacher"][piece],
            dtype=dtype,
        )[0]
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert {value.dtype for value in values} == {torch.float32}
    torch.testing.assert_close(*values, rtol=0.02, atol=0.0)


def test_no_valid_token_gives_zero_loss_and_zero_gradient(rows):
    total, _, _ = head_loss(
        Objective(ForwardKL(), 1.0, 1.0),
        rows["hidden"][:0],
        Head(rows["weight"], rows["bias"]),
        Labels(rows["labels"][:0]),
        teacher=lambda piece: rows["teacher"][piece],
        dtype=torch.float64,
    )
    total.backward()
    assert total.item() == 0.0
    assert all(gradient.abs().sum() == 0.0 for gradient in gradients(rows))


def test_a_model_that_does_something_to_its_logits_is_refused(make_model):
    model = make_model()
    check_linear_head(model, "student")
    plain = model.forward

    def capped(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output

    model.forward = capped
    with pytest.raises(ModelError, match=r"student's logits .* linear head"):
        check_linear_head(model, "student")
