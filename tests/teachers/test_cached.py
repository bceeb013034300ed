"""Distilling from a cache: what it learns, that the teacher runs once, how it survives."""

import json

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.nn import functional as F

from trt_kd.artifacts import work_directory
from trt_kd.checkpoints import load_model, load_tokenizer
from trt_kd.data.base import token_blocks
from trt_kd.errors import ArtifactError, ModelError
from trt_kd.stages.distill import DistillConfig, distill
from trt_kd.stages.teaching import train_student
from trt_kd.teachers import TEACHERS
from trt_kd.teachers import writing as writing_module
from trt_kd.teachers.base import Demand, Teacher
from trt_kd.teachers.cache import Cache
from trt_kd.teachers.cached import CachedTeacher
from trt_kd.teachers.identity import identity_of
from trt_kd.teachers.mixing import Mixture
from trt_kd.teachers.online import OnlineTeacher

STEPS, VOCABULARY = 6, 512


@pytest.fixture(scope="module")
def student(make_student):
    return make_student()


@pytest.fixture(scope="module")
def settings(text_file):
    def make(teacher="cached", **changes):
        plain = {
            "teacher": teacher,
            "data": {"source": {"kind": "text", "files": [str(text_file)]}, "block_tokens": 32},
            "steps": STEPS,
            "batch_size": 2,
            "learning_rate": 1e-3,
            "checkpoint_every_steps": 2,
            "precision": "fp32",
            "monitor": None,
        }
        return DistillConfig.model_validate(plain | changes)

    return make


@pytest.fixture(scope="module")
def online(tmp_path_factory, settings, student, teacher):
    out = tmp_path_factory.mktemp("online") / "out"
    return distill(settings("online", task_weight=0.5), student=student, teacher=teacher, out=out)


@pytest.fixture(scope="module")
def run_on_both_terms(settings, student, teacher):
    def run(out):
        return distill(settings(task_weight=0.5), student=student, teacher=teacher, out=out)

    return run


@pytest.fixture(scope="module")
def cached(tmp_path_factory, run_on_both_terms):
    """A run that nothing interrupted."""
    return run_on_both_terms(tmp_path_factory.mktemp("cached") / "out")


@pytest.fixture
def loads(monkeypatch):
    """Count of the teacher's loads."""
    counted, real = [], OnlineTeacher.load

    def load(self, directory, *, precision):
        counted.append(directory)
        return real(self, directory, precision=precision)

    monkeypatch.setattr(OnlineTeacher, "load", load)
    return counted


def history(artifact):
    lines = (artifact.path / "history.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def losses(artifact):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history(artifact)]


def weights(artifact):
    return load_file(artifact.path / "model.safetensors")


def vector(artifact):
    found = weights(artifact)
    return torch.cat([found[name].flatten() for name in sorted(found)])


def heldout_kl(config, teacher, model):
    tokenizer = load_tokenizer(teacher.path)
    blocks = token_blocks(config.data, tokenizer, split="heldout", count=16)
    with torch.no_grad():
        p = load_model(teacher.path)(torch.from_numpy(blocks)).logits.log_softmax(-1)
        q = load_model(model.path)(torch.from_numpy(blocks)).logits.log_softmax(-1)
    return F.kl_div(q, p, reduction="sum", log_target=True).item() / blocks.size


@pytest.mark.parametrize("k", [VOCABULARY, VOCABULARY - 12])
def test_with_nearly_all_tokens_kept_cached_and_online_agree(
    online, settings, student, teacher, tmp_path, k
):
    config = settings({"kind": "cached", "k": k, "draws": 0}, task_weight=0.5)
    made = distill(config, student=student, teacher=teacher, out=tmp_path / "out")
    for one, other in zip(history(made), history(online), strict=True):
        for name in ("loss_nats_per_token", "response_nats_per_token", "task_nats_per_token"):
            assert one[name] == pytest.approx(other[name], rel=0.02)
    parts = [vector(one) for one in (made, online, student)]
    assert (parts[0] - parts[1]).norm() < 0.2 * (parts[1] - parts[2]).norm()


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_few_tokens_bring_the_student_closer_to_the_dense_teacher_on_held_out_text(
    settings, student, teacher, tmp_path, loss, precision
):
    longer = {"steps": 20, "batch_size": 4, "checkpoint_every_steps": 20, "precision": precision}
    config = settings({"kind": "cached", "k": 64}, loss=loss, **longer)
    made = distill(config, student=student, teacher=teacher, out=tmp_path / "out")
    before, after = (heldout_kl(config, teacher, model) for model in (student, made))
    assert after < 0.7 * before


def first_loss(artifact):
    return history(artifact)[0]["response_nats_per_token"]


def test_without_draws_the_loss_is_at_most_the_online_one(
    online, settings, student, teacher, tmp_path
):
    config = settings({"kind": "cached", "draws": 0}, task_weight=0.5, steps=1)
    made = distill(config, student=student, teacher=teacher, out=tmp_path / "out")
    assert 0.3 * first_loss(online) < first_loss(made) < 0.95 * first_loss(online)


def test_with_draws_the_loss_is_about_the_online_one(cached, online):
    assert first_loss(cached) == pytest.approx(first_loss(online), rel=0.04)


def test_draws_that_a_loss_does_not_read_are_refused_and_the_default_is_not(settings):
    assert settings({"kind": "cached"}, loss="jsd").teacher.draws is None
    with pytest.raises(
        ValidationError, match="jsd does not read draws, of which there are 4: set draws to 0"
    ):
        settings({"kind": "cached", "draws": 4}, loss="jsd")
    with pytest.raises(ValidationError, match="draws 64 must be less than k 64"):
        settings({"kind": "cached", "k": 64, "draws": 64})


def test_the_teacher_is_loaded_once_and_the_work_folder_is_removed(
    cached, run_on_both_terms, teacher, tmp_path, loads
):
    out = tmp_path / "out"
    again = run_on_both_terms(out)
    assert loads == [teacher.path]
    assert losses(again) == losses(cached)
    assert not work_directory(out).exists()


def test_a_shared_cache_serves_other_losses_and_batch_sizes_without_the_teacher(
    settings, student, teacher, tmp_path, loads
):
    shared = {"kind": "cached", "k": 16, "cache": str(tmp_path / "logits")}
    first = distill(settings(shared), student=student, teacher=teacher, out=tmp_path / "a")
    config = settings(shared, loss="jsd", batch_size=3, steps=4, learning_rate=1e-4)
    distill(config, student=student, teacher=teacher, out=tmp_path / "b")
    assert len(loads) == 1
    assert str(tmp_path) not in json.dumps(first.manifest.config["teacher"])


def test_where_the_cache_lies_is_no_part_of_the_settings_identity(settings, tmp_path):
    here, there = (
        settings({"kind": "cached", "cache": str(tmp_path / name)}) for name in ("a", "b")
    )
    assert here.model_dump(mode="json") == there.model_dump(mode="json")
    assert here.teacher.cache == tmp_path / "a"


class Kill(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("moment", ["caching", "training"])
def test_a_killed_run_ends_as_an_uninterrupted_one(
    cached, run_on_both_terms, tmp_path, monkeypatch, loads, moment
):
    out = tmp_path / "out"
    monkeypatch.setattr(writing_module, "SHARD_TOKENS", 1)  # one batch of four blocks to a shard

    def kill(*args, **kwargs):
        raise Kill

    with monkeypatch.context() as patch:
        if moment == "caching":
            real, calls = writing_module.write_shard, iter(range(100))
            patch.setattr(
                writing_module,
                "write_shard",
                lambda *args: kill() if next(calls) == 2 else real(*args),
            )
        else:
            patch.setattr("trt_kd.training.callbacks.remove_older", kill)
        with pytest.raises(Kill):
            run_on_both_terms(out)
    assert len(list((work_directory(out) / "logits").glob("shard-*"))) == (
        2 if moment == "caching" else 3
    )
    made = run_on_both_terms(out)
    assert len(loads) == (2 if moment == "caching" else 1)
    assert losses(made) == losses(cached)
    torch.testing.assert_close(weights(made), weights(cached), rtol=0, atol=0)


def test_a_cache_can_be_given_instead_of_a_teacher(
    cached, settings, student, teacher, tmp_path, loads
):
    config = settings("online", task_weight=0.5)
    blocks = token_blocks(
        config.data, load_tokenizer(student.path), split="train", count=config.sequences
    )
    cache = CachedTeacher().targets(teacher.path, Demand(blocks, "fp32", tmp_path / "elsewhere"))
    loads.clear()
    model = load_model(student.path, dtype="float32")
    rows = train_student(config, model, blocks, cache, tmp_path / "work").steps
    assert loads == []
    timeless = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert timeless == losses(cached)


def test_a_cache_without_the_blocks_ends_training_with_two_lines(
    settings, student, teacher, tmp_path
):
    config = settings()
    blocks = token_blocks(
        config.data, load_tokenizer(student.path), split="train", count=config.sequences
    )
    cache = CachedTeacher().targets(teacher.path, Demand(blocks[:3], "fp32", tmp_path))
    model = load_model(student.path, dtype="float32")
    with pytest.raises(ArtifactError, match="lacks 1 of 2 blocks") as error:
        train_student(config, model, blocks, cache, tmp_path / "work")
    assert len(str(error.value).splitlines()) == 2


def test_a_shared_cache_of_another_teacher_is_refused(settings, student, teacher, tmp_path):
    shared = {"kind": "cached", "cache": str(tmp_path / "logits")}
    distill(settings(shared), student=student, teacher=teacher, out=tmp_path / "a")
    with pytest.raises(ModelError, match="another teacher"):
        distill(settings(shared), student=student, teacher=student, out=tmp_path / "b")


def test_a_rehearsal_leaves_a_shared_cache_alone(settings, tmp_path):
    config = settings({"kind": "cached", "k": 16, "cache": str(tmp_path / "logits")})
    assert config.rehearsal().teacher == CachedTeacher(k=16)
    assert settings("online").rehearsal().teacher == OnlineTeacher()


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jsd"])
def test_a_loss_at_another_temperature_is_refused_with_the_choices(settings, loss):
    warm = {"kind": loss, "temperature": 2.0}
    with pytest.raises(ValidationError, match=r"whole distribution.*forward_kl, reverse_kl, jsd"):
        settings(loss=warm)
    assert settings("online", loss=warm).loss.temperature == 2.0
    assert settings(loss=warm, response_weight=0.0, task_weight=1.0).loss.temperature == 2.0


@pytest.mark.parametrize("k", [0, -1, 1.5])
def test_an_impossible_k_is_refused(settings, k):
    with pytest.raises(ValidationError):
        settings({"kind": "cached", "k": k})


@pytest.mark.parametrize("kind", TEACHERS.names())
def test_every_teacher_makes_ready_what_training_takes(
    kind, teacher, tmp_path, settings, teacher_options
):
    member: Teacher = TEACHERS.load(kind).model_validate({"kind": kind} | teacher_options(kind))
    blocks = token_blocks(settings().data, load_tokenizer(teacher.path), split="train", count=2)
    targets = member.targets(teacher.path, Demand(blocks, "fp32", tmp_path, None, teacher.path))
    if isinstance(targets, Cache):
        assert targets.holds(blocks).all()
    else:
        models = (
            targets.models if isinstance(targets, Mixture) else [getattr(targets, "model", targets)]
        )
        assert not any(one.requires_grad for model in models for one in model.parameters())


def test_a_cache_says_whose_it_is(teacher, tmp_path, settings):
    blocks = token_blocks(settings().data, load_tokenizer(teacher.path), split="train", count=1)
    cache = CachedTeacher().targets(teacher.path, Demand(blocks, "fp32", tmp_path))
    assert cache.index.contents.identity == identity_of(teacher.path, precision="fp32")
