"""What a monitor measures is what the evaluation measures, and plain autograd's gradients."""

import numpy as np
import pytest
import torch

from trt_kd.evaluation.fidelity import block_scores
from trt_kd.losses.top_k import top_k_of
from trt_kd.training import heldout
from trt_kd.training.head import Head
from trt_kd.training.heldout import heldout_sums, layer_gradient_norms

BLOCKS, LENGTH, HIDDEN, VOCABULARY = 3, 9, 8, 29


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(BLOCKS, LENGTH, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    teacher = hidden @ weight.T + torch.randn(BLOCKS, LENGTH, VOCABULARY, generator=generator)
    tokens = torch.randint(VOCABULARY, (BLOCKS, LENGTH), generator=generator)
    return hidden, Head(weight), teacher, tokens


def sums(given, rows):
    hidden, head, _, tokens = given
    return heldout_sums(hidden[:, :-1].flatten(0, 1), head, tokens[:, 1:].flatten(), rows)


@pytest.mark.parametrize("rows_at_a_time", [1, 7, 1000])
def test_task_divergence_and_agreement_are_those_of_the_evaluation(
    given, rows_at_a_time, monkeypatch
):
    monkeypatch.setattr(heldout, "LOGITS_BYTES", rows_at_a_time * 4 * VOCABULARY)
    hidden, head, teacher, tokens = given
    flat = teacher[:, :-1].flatten(0, 1)
    scores = block_scores(
        head.logits(hidden).numpy(), teacher.numpy(), tokens.numpy().astype(np.int64)
    )
    expected = [scores.loss_nats, scores.kl_nats, scores.top1_agreement]
    task, _, divergence, agreement = (sums(given, flat.__getitem__) / len(flat)).tolist()
    assert [task, divergence, agreement] == pytest.approx([x.mean() for x in expected], rel=1e-5)


def test_entropy_is_that_of_torchs_distribution(given):
    hidden, head, _, _ = given
    logits = head.logits(hidden[:, :-1].flatten(0, 1))
    expected = torch.distributions.Categorical(logits=logits).entropy().sum()
    assert sums(given, None)[1].item() == pytest.approx(expected.item(), rel=1e-5)


def test_without_a_teacher_there_is_neither_divergence_nor_agreement(given):
    assert sums(given, None)[2:].tolist() == [0.0, 0.0]


def test_a_teacher_that_is_the_student_is_agreed_with_everywhere(given):
    hidden, head, _, _ = given
    own = head.logits(hidden[:, :-1].flatten(0, 1))
    divergence, agreement = sums(given, own.__getitem__)[2:].tolist()
    assert divergence == pytest.approx(0.0, abs=1e-4)
    assert agreement == len(own)


@pytest.mark.parametrize("k", [1, 5, VOCABULARY - 1, VOCABULARY])
def test_a_teachers_top_k_gives_the_same_agreement_and_a_lower_bound_of_the_divergence(given, k):
    flat = given[2][:, :-1].flatten(0, 1)
    dense = sums(given, flat.__getitem__)
    bucketed = sums(given, top_k_of(flat, k).__getitem__)
    assert bucketed[3] == dense[3]
    assert bucketed[2] <= dense[2] + 1e-4
    if k >= VOCABULARY - 1:
        assert bucketed[2].item() == pytest.approx(dense[2].item(), rel=1e-4)


def test_gradient_norms_by_layer_add_up_to_the_gradients_norm(make_model):
    model = make_model()
    tokens = torch.arange(16).reshape(1, 16)
    model(input_ids=tokens, labels=tokens).loss.backward()
    norms = layer_gradient_norms(model.named_parameters())
    assert set(norms) == {"outside_layers", *(f"layer_{n}" for n in range(4))}
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item()
    assert sum(norm**2 for norm in norms.values()) ** 0.5 == pytest.approx(total, rel=1e-5)
    one = torch.cat([p.grad.flatten() for p in model.model.layers[2].parameters()]).norm()
    assert norms["layer_2"] == pytest.approx(one.item(), rel=1e-5)


def test_parameters_without_a_gradient_have_no_norm(make_model):
    assert layer_gradient_norms(make_model().named_parameters()) == {}
