"""Distilling step-by-step: two tasks from one trace, against plain float64 autograd."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from trt_kd.checkpoints import load_model, load_tokenizer
from trt_kd.data.base import documents
from trt_kd.errors import DataError
from trt_kd.stages import teaching
from trt_kd.stages.distill import DistillConfig, distill, text_of
from trt_kd.training.run import Run, Text

BLOCK = 96
PLAIN = {"response_weight": 0.0, "task_weight": 1.0}


@pytest.fixture(scope="module")
def settings(make_settings, traces):
    return make_settings(
        data={"source": traces, "block_tokens": BLOCK, "heldout_share": 0.2},
        steps=2,
        checkpoint_every_steps=1,
        two_tasks={"rationale_weight": 0.5},
        **PLAIN,
    )


@pytest.fixture(scope="module")
def student(make_student):
    return make_student(noise=0.03)


@pytest.fixture(scope="module")
def tokenizer(student):
    return load_tokenizer(student.path)


def examples(config, tokenizer, split="train"):
    """The prompt and what is learnt of every example, read from the file by plain means."""
    file = Path(config.data.source.artifact) / "generated.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    by_text = {row["text"]: row for row in map(json.loads, lines)}
    kept = {text: by_text[text] for text in documents(config.data, split)}

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    found = {}
    for text, row in kept.items():
        prompt = row["prompt"].removesuffix("<think>")
        found[text] = [
            (ids(f"[label] {prompt}"), [*ids(row["answer"]), tokenizer.eos_token_id]),
            (ids(f"[rationale] {prompt}"), [*ids(row["thought"]), tokenizer.eos_token_id]),
        ]
    return found


def loss_of(model, example):
    """Nats of every token that is learnt, with nothing beside the example."""
    prompt, learnt = example
    logits = model(torch.tensor([prompt + learnt])).logits[0, len(prompt) - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(learnt), reduction="none")


def test_a_block_is_one_example_and_both_of_a_trace_follow_each_other(settings, tokenizer):
    config = settings(steps=4)
    text = text_of(config, tokenizer)
    known = [
        [tuple(map(tuple, example)) for example in pair]
        for pair in examples(config, tokenizer).values()
    ]
    found = []
    for tokens, weights in zip(text.blocks.tolist(), text.weights, strict=True):
        places = np.flatnonzero(weights)
        begin, end = places[0], places[-1] + 1
        assert places.tolist() == list(range(begin, end))
        assert set(tokens[end:]) <= {tokenizer.eos_token_id}
        found.append((tuple(tokens[:begin]), tuple(tokens[begin:end])))
    pairs = [found[n : n + 2] for n in range(0, len(found), 2)]
    assert len(pairs) == 4
    assert all(pair in known for pair in pairs)
    assert all(pairs.count(pair) == 1 for pair in pairs)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (4, 1)])
def test_a_step_is_that_of_two_means_in_float64(
    settings, student, tokenizer, tmp_path, shape, log_of
):
    batch_size, passes = shape
    changes = {"steps": 1, "batch_size": batch_size, "gradient_accumulation": passes}
    config = settings(**changes)
    row = log_of(distill(config, student=student, out=tmp_path / "out"))[0]
    text = text_of(config, tokenizer)
    known = [x for pair in examples(config, tokenizer).values() for x in pair]
    model = load_model(student.path).double()
    nats = [[], []]
    for number, tokens in enumerate(text.blocks):
        (example,) = [x for x in known if list(tokens[: len(x[0] + x[1])]) == x[0] + x[1]]
        nats[number % 2].append(loss_of(model, example))
    label, rationale = (torch.cat(part).mean() for part in nats)
    total = label + 0.5 * rationale
    gradients = torch.autograd.grad(total, [*model.parameters()])
    norm = torch.stack([g.norm() for g in gradients]).norm().item()
    assert row["task_nats_per_token"] == pytest.approx(total.item(), rel=1e-5)
    assert row["loss_nats_per_token"] == pytest.approx(total.item(), rel=1e-5)
    assert row["label_nats_per_token"] == pytest.approx(label.item(), rel=1e-5)
    assert row["rationale_nats_per_token"] == pytest.approx(rationale.item(), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)


def trained(model, config, text, work, **changes):
    log = teaching.train_in(Run(config, work, **changes), config, model, text, None)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in log.steps]
    return rows, {name: value.clone() for name, value in model.state_dict().items()}


def test_weights_of_one_everywhere_are_the_plain_loss_bit_for_bit(
    settings, student, tokenizer, tmp_path
):
    config = settings(two_tasks=None)
    blocks = text_of(config, tokenizer).blocks
    found = [
        trained(load_model(student.path), config, text, tmp_path / name)
        for name, text in (
            ("plain", Text(blocks)),
            ("ones", Text(blocks, weights=np.ones(blocks.shape, dtype=np.float32))),
        )
    ]
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=0)


def test_a_rationale_weight_of_zero_is_the_label_task_alone(settings, student, tokenizer, tmp_path):
    """The same answers at the same steps, with no example of a rationale there at all."""
    config = settings(two_tasks={"rationale_weight": 0.0})
    both = text_of(config, tokenizer)
    assert not both.weights[1::2].any()
    assert set(both.weights[::2].flatten()) == {0.0, 1.0}
    labels = Text(both.blocks[::2], weights=both.weights[::2])
    alone = settings(batch_size=1, two_tasks=None)
    rows, state = trained(load_model(student.path), config, both, tmp_path / "both")
    expected, state_alone = trained(load_model(student.path), alone, labels, tmp_path / "labels")
    for row, other in zip(rows, expected, strict=True):
        assert row.pop("label_nats_per_token") == pytest.approx(row["task_nats_per_token"])
        assert row == pytest.approx(other, rel=1e-5)
    torch.testing.assert_close(state, state_alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("teacher_kind", [None, "online", "cached"])
def test_what_is_not_learnt_never_matters_nan_included(
    settings, roles, tmp_path, monkeypatch, teacher_kind, assert_same_run
):
    """Prompts are read, so only what is predicted there may differ: states are poisoned."""
    from trt_kd.training.objective import ObjectiveTrainer

    changes = {} if teacher_kind is None else {"response_weight": 1.0, "teacher": teacher_kind}
    config = settings(exits=None, **changes)
    inputs = {name: roles[name] for name in roles if name == "student" or teacher_kind}
    plain = distill(config, **inputs, out=tmp_path / "plain")
    learnt = text_of(config, load_tokenizer(roles["student"].path))
    real = ObjectiveTrainer._hidden_states

    def poisoned(self, model, tokens_BL):
        hidden_BLD = real(self, model, tokens_BL)
        place = [np.flatnonzero((learnt.blocks == row).all(1))[0] for row in tokens_BL.numpy()]
        counts_BL = torch.from_numpy(learnt.weights[place] > 0).roll(-1, 1)
        return torch.where(counts_BL.unsqueeze(-1), hidden_BLD, torch.nan)

    monkeypatch.setattr(ObjectiveTrainer, "_hidden_states", poisoned)
    other = distill(config, **inputs, out=tmp_path / "poisoned")
    assert_same_run(plain, other)


def test_a_teacher_is_heard_where_something_is_learnt(settings, student, teacher, tmp_path, log_of):
    config = settings(response_weight=1.0, task_weight=0.3, steps=1)
    row = log_of(distill(config, student=student, teacher=teacher, out=tmp_path / "out"))[0]
    tokenizer = load_tokenizer(student.path)
    text = text_of(config, tokenizer)
    models = [load_model(one.path).double() for one in (student, teacher)]
    with torch.no_grad():
        q, p = (m(torch.from_numpy(text.blocks)).logits[:, :-1].log_softmax(-1) for m in models)
    mask = torch.from_numpy(text.weights[:, 1:] > 0)
    expected = F.kl_div(q[mask], p[mask], reduction="sum", log_target=True) / mask.sum()
    assert row["response_nats_per_token"] == pytest.approx(expected.item(), rel=1e-4)
    cached = settings(
        response_weight=1.0, task_weight=0.3, steps=1, teacher={"kind": "cached", "k": 500}
    )
    made = distill(cached, student=student, teacher=teacher, out=tmp_path / "cached")
    assert log_of(made)[0]["task_nats_per_token"] == row["task_nats_per_token"]
    assert log_of(made)[0]["response_nats_per_token"] == pytest.approx(expected.item(), rel=0.05)


def test_the_monitor_measures_what_is_learnt_of_held_out_traces(
    settings, student, tokenizer, tmp_path, log_of
):
    config = settings(steps=1, monitor={"every_steps": 1, "blocks": 3, "skip_blocks": 1})
    made = distill(config, student=student, out=tmp_path / "out")
    assert made.metrics["learnt_tokens"] == (text_of(config, tokenizer).weights > 0).sum()
    text, model = text_of(config, tokenizer), load_model(student.path).double()
    known = [x for pair in examples(config, tokenizer, "heldout").values() for x in pair]
    nats = []
    for tokens in text.heldout:
        (example,) = [x for x in known if list(tokens[: len(x[0] + x[1])]) == x[0] + x[1]]
        with torch.no_grad():
            nats.append(loss_of(model, example))
    found = log_of(made, "monitors")[0]["heldout_task_nats_per_token"]
    assert found == pytest.approx(torch.cat(nats).mean().item(), rel=1e-5)


def test_a_run_that_is_killed_ends_with_the_same_weights(
    settings, student, tmp_path, monkeypatch, assert_same_run
):
    config = settings(steps=4)
    whole = distill(config, student=student, out=tmp_path / "whole")
    from trt_kd.training.blocks import Blocks

    real, steps = Blocks.__getitem__, []

    def cut(self, index):
        steps.append(index)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return real(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(Blocks, "__getitem__", cut)
        with pytest.raises(KeyboardInterrupt):
            distill(config, student=student, out=tmp_path / "cut")
    again = distill(config, student=student, out=tmp_path / "cut")
    assert_same_run(whole, again)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {}}, "stdlib_docstrings text has no traces"),
        ({"task_weight": 0.0, "response_weight": 1.0}, "no effect: task_weight is 0"),
        ({"batch_size": 3}, "a step of 3 sequences does not hold both tasks"),
        ({"response_weight": 1.0, "loss": "uld", "teacher": "cross_tokenizer"},
         "a cross_tokenizer teacher reads plain text"),
        ({"packing": {"reset": True}}, "leave packing.reset out"),
        ({"features": [{"loss": "mse"}]}, "features compare whole blocks"),
        ({"response_weight": 1.0, "steps": 20, "on_policy": {"prompt_tokens": 4, "new_tokens": 4}},
         "leave on_policy out"),
        ({"two_tasks": {"label_prefix": "a", "rationale_prefix": "a"}}, "both 'a'"),
        ({"two_tasks": {"rationale_weight": -1}}, "greater than or equal to 0"),
    ],
)  # fmt: skip
def test_settings_without_sense_or_effect_are_refused(settings, changes, message):
    with pytest.raises(ValidationError, match=message):
        settings(**changes)


def test_text_that_does_not_do_is_told_before_a_model_is_loaded(
    settings, student, write_traces, tmp_path, monkeypatch
):
    monkeypatch.setattr("trt_kd.stages.distill.load_model", None)
    plain = write_traces(tmp_path / "plain", traces=None)
    data = {"source": plain, "block_tokens": BLOCK}
    cases = [
        ({"data": data}, "holds no text with a trace"),
        ({"steps": 100}, "traces, two blocks each, not 100"),
        ({"monitor": {}}, "monitor: the heldout split holds"),
        ({"monitor": {"blocks": 1, "skip_blocks": 1}, "two_tasks": {"rationale_weight": 0.0}},
         "monitor: no answer stands"),
        ({"data": settings().data.model_copy(update={"block_tokens": 20}).model_dump()},
         "tokens, more than data.block_tokens 20"),
    ]  # fmt: skip
    for number, (changes, message) in enumerate(cases):
        with pytest.raises(DataError, match=message) as caught:
            distill(settings(**changes), student=student, out=tmp_path / f"out-{number}")
        assert len(str(caught.value).splitlines()) == 2


def test_a_rehearsal_is_legal_and_the_control_reads_the_same_tokens(settings, tokenizer):
    config = settings(response_weight=1.0)
    short = config.rehearsal()
    assert DistillConfig.model_validate(short.model_dump()).sequences == 4
    control = config.cross_entropy()
    DistillConfig.model_validate(control.model_dump())
    first, second = text_of(config, tokenizer), text_of(control, tokenizer)
    assert np.array_equal(first.blocks, second.blocks)
    assert np.array_equal(first.weights, second.weights)
