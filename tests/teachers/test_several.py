"""Several teachers: exact against a naive mean in float64, rows at a time, known by content."""

import json
import shutil

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from trt_kd.artifacts import Artifact, work_key, writing
from trt_kd.checkpoints import load_model, load_tokenizer, save_model
from trt_kd.config import StageConfig
from trt_kd.data.base import token_blocks
from trt_kd.errors import ModelError
from trt_kd.stages.distill import DistillConfig, distill
from trt_kd.teachers.mixing import MixedRows
from trt_kd.teachers.online import OnlineTeacher
from trt_kd.training import head as head_module

SHARES = (0.5, 0.3, 0.2)


class OtherConfig(StageConfig):
    """Stands for the stage that made a checkpoint."""

    stage = "prune"


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_model, tokenizer_dir):
    """Checkpoints of different weights by seed."""

    def make(seed, **changes):
        out = tmp_path_factory.mktemp("other") / f"model-{seed}"
        with writing(out, kind="checkpoint", config=OtherConfig(), inputs={}) as draft:
            save_model(make_model(seed=seed, **changes), draft.path, tokenizer_from=tokenizer_dir)
        return Artifact.open(out)

    return make


@pytest.fixture(scope="module")
def student(made):
    return made(9)


@pytest.fixture(scope="module")
def teachers(teacher, made):
    return [teacher, made(3), made(4, num_hidden_layers=2)]


@pytest.fixture(scope="module")
def settings(text_file, teachers):
    def make(changes=None, **more):
        others = [str(one.path) for one in teachers[1:]]
        plain = {
            "teacher": {"kind": "several", "others": others} | (changes or {}),
            "data": {"source": {"kind": "text", "files": [str(text_file)]}, "block_tokens": 32},
            "steps": 1,
            "batch_size": 4,
            "precision": "fp32",
        }
        return DistillConfig.model_validate(plain | more)

    return make


@pytest.fixture(scope="module")
def first_batch(settings, student):
    config = settings()
    tokenizer = load_tokenizer(student.path)
    blocks = token_blocks(config.data, tokenizer, split="train", count=config.batch_size)
    return torch.from_numpy(np.array(blocks))


@pytest.fixture(scope="module")
def dense(first_batch, teachers, student):
    """Tokens; logits of every teacher and of the student, ``[T, V]`` each, in float64."""

    def logits(artifact):
        with torch.no_grad():
            model = load_model(artifact.path, dtype="float64")
            return model(first_batch).logits[:, :-1].flatten(0, 1)

    return first_batch, [logits(one) for one in teachers], logits(student)


def naive(combine, logits, tokens, shares):
    """The mixture's probabilities, all at once."""
    if combine == "probabilities":
        parts = [share * one.softmax(-1) for one, share in zip(logits, shares, strict=True)]
        return sum(parts)
    if combine == "logits":
        parts = [share * one for one, share in zip(logits, shares, strict=True)]
        return sum(parts).softmax(-1)
    labels = tokens[:, 1:].flatten()
    rows = torch.arange(len(labels))
    nll = torch.stack([-one.log_softmax(-1)[rows, labels] for one in logits])
    sums = nll.reshape(len(logits), len(tokens), -1).sum(-1)
    best = sums.argmin(0).repeat_interleave(tokens.shape[1] - 1)
    return torch.stack(logits)[best, rows].softmax(-1)


@pytest.mark.parametrize("combine", ["probabilities", "logits", "best"])
def test_the_first_loss_is_that_of_a_naive_mean(
    settings, teacher, student, dense, tmp_path, combine
):
    weights = {} if combine == "best" else {"weights": [5, 3, 2]}
    config = settings({"combine": combine} | weights)
    done = distill(config, student=student, teacher=teacher, out=tmp_path / "out")
    tokens, logits, student_logits = dense
    p = naive(combine, logits, tokens, SHARES)
    expected = (p * (p.log() - student_logits.log_softmax(-1))).sum(-1).mean().item()
    row = json.loads((done.path / "history.jsonl").read_text(encoding="utf-8"))
    assert row["response_nats_per_token"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("of_logits", [True, False])
def test_mixed_rows_are_exact_in_float64(of_logits):
    generator = torch.Generator().manual_seed(0)
    parts = [9 * torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in SHARES]
    rows = MixedRows(parts, SHARES, of_logits)[slice(2, 6)]
    combine = "logits" if of_logits else "probabilities"
    expected = naive(combine, [part[2:6] for part in parts], None, SHARES)
    torch.testing.assert_close(rows.softmax(-1), expected, rtol=1e-12, atol=0)
    assert MixedRows([part.bfloat16() for part in parts], SHARES, of_logits)[:2].dtype == (
        torch.float32
    )


def test_a_mean_of_probabilities_keeps_what_one_teacher_all_but_excludes():
    parts = [torch.tensor([[0.0, -300.0]]), torch.tensor([[-300.0, 0.0]])]
    rows = MixedRows(parts, (0.5, 0.5), of_logits=False)[:1]
    torch.testing.assert_close(rows.exp(), torch.tensor([[0.5, 0.5]]))


@pytest.mark.parametrize("combine", ["probabilities", "best"])
def test_no_teacher_ever_gives_logits_for_the_whole_batch(
    settings, teacher, student, tmp_path, monkeypatch, combine
):
    seen, real = [], head_module.Head.logits
    monkeypatch.setattr(head_module, "GROUP_BYTES", {"cpu": 8 * 4 * 512})
    monkeypatch.setattr(head_module, "ROWS_BYTES", {"cpu": 8 * 4 * 512})
    monkeypatch.setattr(
        head_module.Head,
        "logits",
        lambda self, hidden: seen.append(len(hidden)) or real(self, hidden),
    )
    config = settings({"combine": combine}).model_copy(update={"monitor": None})
    distill(config, student=student, teacher=teacher, out=tmp_path / "out")
    assert len(seen) > 4 * 31 // 8
    assert max(seen) <= 8


def test_one_teacher_twice_is_that_teacher(settings, teacher, student, tmp_path):
    twice = settings({"others": [str(teacher.path)], "weights": [1, 4]}, steps=3)
    once = settings(steps=3).model_copy(update={"teacher": OnlineTeacher()})
    losses = [
        distill(config, student=student, teacher=teacher, out=tmp_path / name).metrics[
            "loss_nats_per_token"
        ]
        for name, config in (("twice", twice), ("once", once))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_run_is_known_by_what_the_others_hold(settings, teachers, made, tmp_path):
    config, keys = settings(), []
    for seed in (3, 3, 5):
        shutil.rmtree(tmp_path / "moving", ignore_errors=True)
        shutil.copytree(made(seed).path, tmp_path / "moving")
        config = settings({"others": [str(tmp_path / "moving")]})
        keys.append(work_key(config, {}))
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": [1, 2]}, "2 weights for 3 teachers"),
        ({"weights": [1, 2, 0]}, "greater than 0"),
        ({"combine": "best", "weights": [1, 1, 1]}, "no effect"),
        ({"others": []}, "at least 1"),
        ({"combine": "mean"}, "probabilities"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, changes, message):
    with pytest.raises(ValidationError, match=message):
        settings(changes)


def test_a_missing_teacher_is_named_when_the_plan_is_made(settings, tmp_path):
    config = settings({"others": [str(tmp_path / "nowhere")]})
    with pytest.raises(ModelError, match="nowhere is not a directory"):
        config.outside()


def test_another_tokenizer_is_refused_before_training(settings, teacher, student, made, tmp_path):
    shutil.copytree(made(6).path, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")
    config = settings({"others": [str(tmp_path / "other")]})
    with pytest.raises(ModelError, match=r"tokenizer\.json .* differ") as error:
        distill(config, student=student, teacher=teacher, out=tmp_path / "out")
    assert len(str(error.value).splitlines()) == 2


def test_a_rehearsal_runs_the_stages_own_teacher(settings, teacher, student, tmp_path):
    config = settings({"weights": [1, 2, 3]}).rehearsal()
    assert config.outside() == settings().data.outside()
    done = distill(config, student=student, teacher=teacher, out=tmp_path / "out")
    assert done.metrics["steps"] == 2
