"""Vocabularies of one tokenizer, padded to different sizes."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from trt_kd.artifacts import Artifact, writing
from trt_kd.checkpoints import load_model, load_tokenizer, save_model
from trt_kd.config import StageConfig
from trt_kd.data.base import token_blocks
from trt_kd.errors import ModelError
from trt_kd.evaluation.vocabulary import real_tokens
from trt_kd.stages.distill import DistillConfig, distill
from trt_kd.stages.matching import check_pair
from trt_kd.training.alignment import aligned
from trt_kd.training.head import Head

REAL, SMALL, LARGE = 512, 516, 528


class PaddedConfig(StageConfig):
    """Stands for the stage that made a padded checkpoint."""

    stage = "prune"


@pytest.fixture(scope="module")
def padded(tmp_path_factory, make_model, tokenizer_dir):
    """A checkpoint whose vocabulary has rows that no token of the tokenizer uses."""

    def make(size, seed=0):
        model = make_model(seed=seed, vocab_size=size)
        out = tmp_path_factory.mktemp("padded") / f"model-{size}"
        with writing(out, kind="checkpoint", config=PaddedConfig(), inputs={}) as draft:
            save_model(model, draft.path, tokenizer_from=tokenizer_dir)
        return Artifact.open(out)

    return make


@pytest.fixture(scope="module")
def small(padded):
    return padded(SMALL, seed=1)


@pytest.fixture(scope="module")
def large(padded):
    return padded(LARGE)


@pytest.fixture(scope="module")
def settings(text_file):
    def make(teacher, **changes):
        plain = {
            "teacher": {"max_dropped_mass": 0.5} | teacher,
            "data": {"source": {"kind": "text", "files": [str(text_file)]}, "block_tokens": 32},
            "steps": 1,
            "batch_size": 4,
            "precision": "fp32",
        }
        return DistillConfig.model_validate(plain | changes)

    return make


def first_row(artifact):
    return json.loads((artifact.path / "history.jsonl").read_text(encoding="utf-8"))


def logits_of(artifact, config):
    """Logits ``[T, V]`` on the first batch, in float64."""
    tokenizer = load_tokenizer(artifact.path)
    blocks = token_blocks(config.data, tokenizer, split="train", count=config.batch_size)
    model = load_model(artifact.path, dtype="float64")
    with torch.no_grad():
        return model(torch.from_numpy(np.array(blocks))).logits[:, :-1].flatten(0, 1)


def kl(p, log_q):
    return torch.where(p > 0, p * (p.clamp_min(1e-300).log() - log_q), 0.0).sum(-1).mean().item()


@pytest.mark.parametrize("teacher", [{"kind": "online"}, {"kind": "cached", "k": SMALL}])
def test_padding_of_the_teacher_is_cut_off_and_the_rest_scaled_up(
    settings, small, large, tmp_path, teacher
):
    config = settings(teacher)
    made = distill(config, student=small, teacher=large, out=tmp_path / "out")
    whole = logits_of(large, config).softmax(-1)
    dropped = whole[:, SMALL:].sum(-1, keepdim=True)
    p = whole[:, :SMALL] / (1 - dropped)
    expected = kl(p, logits_of(small, config).log_softmax(-1))
    close = 1e-5 if teacher["kind"] == "online" else 0.02
    row = first_row(made)
    assert row["response_nats_per_token"] == pytest.approx(expected, rel=close)
    assert row["dropped_teacher_mass"] == pytest.approx(dropped.mean().item(), rel=1e-4)
    assert made.metrics["dropped_teacher_mass"] == row["dropped_teacher_mass"]


@pytest.mark.parametrize("teacher", [{"kind": "online"}, {"kind": "cached", "k": SMALL}])
def test_the_teacher_never_says_what_only_the_student_has(
    settings, small, large, tmp_path, teacher
):
    config = settings(teacher, allow_smaller_teacher=True)
    made = distill(config, student=large, teacher=small, out=tmp_path / "out")
    p = F.pad(logits_of(small, config).softmax(-1), (0, LARGE - SMALL))
    expected = kl(p, logits_of(large, config).log_softmax(-1))
    close = 1e-5 if teacher["kind"] == "online" else 0.02
    assert first_row(made)["response_nats_per_token"] == pytest.approx(expected, rel=close)
    assert "dropped_teacher_mass" not in made.metrics


@pytest.mark.parametrize("size", [5, 7, 9])
def test_an_aligned_head_has_the_students_columns_and_the_teachers_shares(size):
    generator = torch.Generator().manual_seed(0)
    weight, bias, hidden = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((7, 3), (7,), (11, 3))
    )
    head = aligned(Head(weight, bias), size)
    whole = (hidden @ weight.T + bias).softmax(-1)
    shared = min(size, 7)
    logits = head.logits(hidden)
    assert logits.shape == (11, size)
    expected = whole[:, :shared] / whole[:, :shared].sum(-1, keepdim=True)
    torch.testing.assert_close(logits.softmax(-1)[:, :shared], expected)
    assert logits.softmax(-1)[:, shared:].sum() < 1e-30
    mass = head.dropped_mass(hidden, logits)
    assert mass.item() == pytest.approx(whole[:, shared:].sum().item(), abs=1e-6)


@pytest.mark.parametrize("kind", ["online", "cached"])
def test_too_much_dropped_mass_is_refused_before_training(settings, small, large, tmp_path, kind):
    config = settings({"kind": kind, "max_dropped_mass": 1e-3})
    with pytest.raises(ModelError, match=r"to the 12 tokens that the student lacks") as error:
        distill(config, student=small, teacher=large, out=tmp_path / "out")
    assert len(str(error.value).splitlines()) == 2
    assert "max_dropped_mass" in str(error.value)


def test_padding_of_one_size_is_not_looked_at(small):
    check_pair(student=small.path, teacher=small.path)


def test_a_vocabulary_that_lacks_a_real_token_is_refused(padded, large):
    with pytest.raises(ModelError, match=r"500 tokens .* 528; the tokenizer uses 512") as error:
        check_pair(student=padded(500).path, teacher=large.path)
    assert len(str(error.value).splitlines()) == 2


def test_real_tokens_are_those_of_the_tokenizer_added_ones_included(tokenizer_dir, tmp_path):
    assert real_tokens(tokenizer_dir) == REAL
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"].append({"id": 600, "content": "<|new|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert real_tokens(tmp_path) == 601
    unigram = {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(unigram), encoding="utf-8")
    assert real_tokens(tmp_path) == 2
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": 3}}', encoding="utf-8")
    with pytest.raises(ModelError, match="is not a tokenizer"):
        real_tokens(tmp_path)
