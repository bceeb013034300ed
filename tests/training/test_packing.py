"""Documents that share a block: what each of them gives is what it gives alone."""

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from trt_kd.checkpoints import load_model, load_tokenizer
from trt_kd.data.base import token_blocks
from trt_kd.errors import ModelError
from trt_kd.stages.distill import DistillConfig, distill
from trt_kd.stages.teaching import train_student
from trt_kd.training.blocks import IGNORE_INDEX, Blocks
from trt_kd.training.packing import check_packing, inputs, positions

END = 0


def documents_of(tokens_L):
    """The block cut after every end."""
    ends = (tokens_L == END).nonzero().flatten() + 1
    return [part for part in tokens_L.tensor_split(ends) if len(part)]


@pytest.fixture
def settings(text_file):
    def make(**changes):
        plain = {
            "data": {"source": {"kind": "text", "files": [str(text_file)]}, "block_tokens": 96},
            "steps": 1,
            "batch_size": 3,
            "precision": "fp32",
            "task_weight": 0.5,
            "packing": {"reset": True},
        }
        return DistillConfig.model_validate(plain | changes)

    return make


def test_positions_start_anew_after_every_end_and_only_there():
    tokens = torch.tensor([[5, 6, END, 7, END, END, 8], [END, 1, 2, 3, 4, 5, 6]])
    expected = [[0, 1, 2, 0, 1, 0, 0], [0, 0, 1, 2, 3, 4, 5]]
    assert positions(tokens, END).tolist() == expected


def test_positions_are_those_of_the_documents_one_by_one():
    tokens = torch.randint(0, 6, (8, 40), generator=torch.Generator().manual_seed(0))
    for row, found in zip(tokens, positions(tokens, END), strict=True):
        alone = torch.cat([torch.arange(len(document)) for document in documents_of(row)])
        assert torch.equal(found, alone)


def test_the_first_token_of_a_document_is_no_label():
    blocks = np.array([[5, 6, END, 7, END, END, 8]])
    (item,) = [Blocks(blocks, END)[0]]
    ignored = IGNORE_INDEX
    assert item["labels"].tolist() == [ignored, 6, END, ignored, END, ignored, ignored]
    assert Blocks(blocks)[0]["labels"].tolist() == [ignored, 6, END, 7, END, END, 8]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_in_a_block_are_those_of_the_document_alone(make_model, attention):
    model = make_model(attn_implementation=attention)
    tokens = torch.randint(1, 512, (2, 48), generator=torch.Generator().manual_seed(0))
    tokens[0, [5, 6, 30]] = tokens[1, [20, 47]] = END
    with torch.no_grad():
        packed = model(**inputs(tokens, END)).logits
        for row, logits in zip(tokens, packed, strict=True):
            alone = [model(document[None]).logits[0] for document in documents_of(row)]
            torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["online", "several"])
def test_losses_and_measurements_of_packed_blocks_are_those_of_their_documents(
    settings, teacher, tmp_path, kind
):
    others = {"others": [str(teacher.path)]} if kind == "several" else {}
    monitor = {"blocks": 12, "skip_blocks": 0}
    config = settings(loss="reverse_kl", teacher={"kind": kind} | others, monitor=monitor)
    trained = distill(config, student=teacher, teacher=teacher, out=tmp_path / "out")
    logs = [
        (trained.path / name).read_text("utf-8") for name in ("history.jsonl", "monitors.jsonl")
    ]
    first, measured = (json.loads(log.splitlines()[0]) for log in logs)
    tokenizer, model = load_tokenizer(teacher.path), load_model(teacher.path)
    assert tokenizer.eos_token_id == END
    train, heldout = (
        torch.from_numpy(token_blocks(config.data, tokenizer, split=split, count=count))
        for split, count in (("train", 3), ("heldout", 12))
    )
    assert first["task_nats_per_token"] == pytest.approx(one_by_one(model, train), rel=1e-5)
    assert first["response_nats_per_token"] == pytest.approx(0.0, abs=1e-6)
    task = measured["heldout_task_nats_per_token"]
    assert task == pytest.approx(one_by_one(model, heldout), rel=1e-5)
    assert measured["heldout_kl_nats_per_token"] == pytest.approx(0.0, abs=1e-6)


def one_by_one(model, blocks):
    """Mean cross-entropy of the documents of the blocks, each on its own."""
    task = count = 0
    for document in (part for block in blocks for part in documents_of(block) if len(part) > 1):
        with torch.no_grad():
            logits = model(document[None]).logits[0, :-1]
        task += F.cross_entropy(logits, document[1:], reduction="sum").item()
        count += len(document) - 1
    assert count < blocks.numel() - len(blocks)
    return task / count


def test_telling_documents_apart_changes_the_loss_and_not_the_text(settings, teacher, tmp_path):
    plain = settings(packing={"reset": False})
    one = distill(plain, student=teacher, teacher=teacher, out=tmp_path / "plain")
    two = distill(settings(), student=teacher, teacher=teacher, out=tmp_path / "reset")
    names = ("task_nats_per_token", "data_fingerprint")
    assert one.metrics[names[0]] != two.metrics[names[0]]
    assert one.metrics[names[1]] == two.metrics[names[1]]


def test_a_model_that_reads_across_documents_is_refused(make_model, monkeypatch):
    model = make_model()
    check_packing(model, "student")
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda **given: forward(**{**given, "position_ids": None})
    )
    with pytest.raises(ModelError, match=r"student \(llama\) reads across documents") as raised:
        check_packing(model, "student")
    assert "packing.reset" in raised.value.hint


def test_a_cached_teacher_which_reads_whole_blocks_is_refused(settings):
    with pytest.raises(
        ValidationError, match=r"packing\.reset needs teacher online or several: cac"
    ):
        settings(teacher="cached")
    assert settings(teacher="online").packing.reset


def test_features_which_compare_whole_blocks_are_refused(settings):
    with pytest.raises(ValidationError, match="features compare whole blocks: leave one of them"):
        settings(features=[{"loss": "mse"}])


def test_a_run_that_does_not_know_the_end_of_a_document_is_refused(settings, make_model, tmp_path):
    with pytest.raises(ValueError, match="needs the token that ends a document"):
        train_student(settings(), make_model(), np.zeros((3, 96), np.int64), None, tmp_path)
