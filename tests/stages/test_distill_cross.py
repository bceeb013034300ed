"""Distillation from a teacher with another tokenizer, against plain loops over sorted lists."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from trt_kd.checkpoints import load_model, load_tokenizer
from trt_kd.data.base import token_blocks
from trt_kd.errors import ModelError
from trt_kd.stages.distill import distill
from trt_kd.teachers.spans import Translator


@pytest.fixture(scope="module")
def made(make_student):
    """A checkpoint artifact of a random model."""
    return lambda tokenizer, **sizes: make_student(0.0, tokenizer=tokenizer, **sizes)


@pytest.fixture(scope="module")
def student(made, tokenizer_dir):
    return made(tokenizer_dir, num_hidden_layers=2, seed=3)


@pytest.fixture(scope="module")
def stranger(made, other_tokenizer):
    return made(other_tokenizer, vocab_size=320)


@pytest.fixture(scope="module")
def settings(make_settings):
    return make_settings(
        loss="uld",
        teacher="cross_tokenizer",
        task_weight=0.5,
        monitor={"every_steps": 2, "blocks": 2, "skip_blocks": 0},
    )


@pytest.fixture(scope="module")
def roles(student, stranger):
    return {"student": student, "teacher": stranger}


@pytest.fixture(scope="module")
def whole(settings, roles, tmp_path_factory):
    return distill(settings(), **roles, out=tmp_path_factory.mktemp("whole") / "out")


def naive(config, student, teacher):
    """Sum over common boundaries, their number, and that of all predictions, in plain loops."""
    ours, theirs = (load_tokenizer(one.path) for one in (student, teacher))
    blocks = token_blocks(config.data, ours, split="train", count=config.batch_size)
    small, large = (load_model(one.path) for one in (student, teacher))
    translator, total, pairs = Translator(ours, theirs), 0.0, 0
    for block in np.array(blocks):
        reading = translator.read(block.tolist())
        with torch.no_grad():
            q = small(torch.from_numpy(block)[None]).logits[0].double().softmax(-1).tolist()
            p = large(torch.tensor([reading.ids])).logits[0].double().softmax(-1).tolist()
        for here, there in reading.pairs:
            if here < len(block) - 1:
                pairs += 1
                one, other = (sorted(x, reverse=True) for x in (q[here], p[there]))
                one += [0.0] * (len(other) - len(one))
                other += [0.0] * (len(one) - len(other))
                total += math.fsum(abs(a - b) for a, b in zip(one, other, strict=True))
    return total, pairs, blocks.shape[0] * (blocks.shape[1] - 1)


def test_the_first_loss_is_that_of_plain_loops_over_common_boundaries(
    whole, settings, student, stranger, log_of
):
    total, pairs, predictions = naive(settings(), student, stranger)
    first = log_of(whole)[0]
    assert first["response_nats_per_token"] == pytest.approx(total / predictions, rel=1e-4)
    assert first["aligned_share"] == pytest.approx(pairs / predictions)
    assert 0.3 < first["aligned_share"] < 1
    assert first["loss_nats_per_token"] == pytest.approx(
        first["response_nats_per_token"] + 0.5 * first["task_nats_per_token"], rel=1e-5
    )
    shares = [row["aligned_share"] for row in log_of(whole)]
    assert whole.metrics["aligned_share"] == pytest.approx(np.mean(shares))


def test_text_is_learnt_at_every_token_and_measured_without_the_teacher(
    whole, settings, student, tmp_path, log_of
):
    plain = settings(response_weight=0, teacher="online", loss="forward_kl")
    control = distill(plain, student=student, out=tmp_path / "out")
    assert log_of(whole)[0]["task_nats_per_token"] == pytest.approx(
        log_of(control)[0]["task_nats_per_token"]
    )
    measured = log_of(whole, "monitors")
    assert [row["step"] for row in measured] == [0, 2, 4]
    assert measured[0]["heldout_task_nats_per_token"] == pytest.approx(
        log_of(control, "monitors")[0]["heldout_task_nats_per_token"]
    )
    assert "heldout_kl_nats_per_token" not in measured[0]


def test_the_response_term_falls(settings, student, stranger, tmp_path, log_of):
    config = settings(task_weight=0, steps=12, learning_rate=4e-3, monitor=None)
    losses = log_of(distill(config, student=student, teacher=stranger, out=tmp_path / "out"))
    found = [row["response_nats_per_token"] for row in losses]
    assert np.mean(found[-4:]) < 0.9 * found[0]


def test_bf16_and_logits_piece_by_piece_change_little(
    whole, settings, roles, tmp_path, monkeypatch, log_of
):
    from trt_kd.training import head

    monkeypatch.setitem(head.GROUP_BYTES, "cpu", 8 * 512 * 2)
    monkeypatch.setitem(head.ROWS_BYTES, "cpu", 3 * 512 * 4)
    config = settings(precision="bf16", steps=1)
    made = distill(config, **roles, out=tmp_path / "out")
    assert log_of(made)[0]["response_nats_per_token"] == pytest.approx(
        log_of(whole)[0]["response_nats_per_token"], rel=0.02
    )
    assert log_of(made)[0]["aligned_share"] == log_of(whole)[0]["aligned_share"]


def test_a_run_cut_off_ends_as_if_it_had_not_been(
    whole, settings, roles, tmp_path, assert_same_run, cut_off
):
    run = partial(distill, settings(), **roles, out=tmp_path / "out")
    cut_off(run, 4)
    assert_same_run(run(), whole)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "forward_kl"}, "forward_kl needs one vocabulary.*defaults: uld; any with"),
        ({"teacher": "cached"}, "uld needs the teacher's whole distribution"),
        ({"sharding": "fsdp2"}, "not cross_tokenizer: write sharding: none"),
        ({"packing": {"reset": True}}, "cross_tokenizer reads a block as one text"),
        ({"on_policy": {}}, "cross_tokenizer teacher has not read"),
        ({"features": [{"loss": "gram"}]}, "cross_tokenizer one has no layers to read"),
        ({"stop_on": ["task_stalls"]}, "the run has no common_tokenizer"),
        (
            {"teacher": {"kind": "cross_tokenizer", "max_dropped_mass": 0.1}},
            "max_dropped_mass has no effect",
        ),
        ({"teacher": {"kind": "cross_tokenizer", "min_aligned_share": 0}}, "greater than 0"),
    ],
)
def test_settings_without_sense_or_effect_are_refused(settings, changes, message):
    with pytest.raises(ValidationError, match=message):
        settings(**changes)


@pytest.fixture
def refusal(settings, student, tmp_path, monkeypatch):
    monkeypatch.setattr("trt_kd.teachers.online.load_model", None)

    def refused(stage_teacher, /, **changes):
        with pytest.raises(ModelError) as raised:
            distill(
                settings(**changes), student=student, teacher=stage_teacher, out=tmp_path / "out"
            )
        assert not (tmp_path / "out").exists()
        return str(raised.value)

    return refused


def test_another_tokenizer_is_refused_unless_it_is_asked_for(refusal, made, other_tokenizer):
    alike = made(other_tokenizer)
    said = refusal(alike, teacher="online", loss="forward_kl")
    assert "tokenizer.json of" in said
    assert "teacher=cross_tokenizer loss=uld" in said


def test_asking_for_another_tokenizer_where_it_is_the_same_is_refused(refusal, teacher):
    said = refusal(teacher)
    assert "have one tokenizer" in said
    assert "teacher: online" in said


def test_too_few_common_boundaries_are_refused(refusal, stranger):
    said = refusal(stranger, teacher={"kind": "cross_tokenizer", "min_aligned_share": 1})
    assert "less than teacher.min_aligned_share 100%" in said
    assert "lower min_aligned_share" in said


def test_a_block_longer_than_the_teachers_context_is_refused(
    made, other_tokenizer, settings, student, tmp_path
):
    short = made(other_tokenizer, vocab_size=320, max_position_embeddings=34)
    with pytest.raises(ModelError, match="more than its context of 34") as raised:
        distill(settings(), student=student, teacher=short, out=tmp_path / "out")
    assert "lower data.block_tokens" in raised.value.hint
