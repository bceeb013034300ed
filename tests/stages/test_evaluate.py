"""The evaluate stage on tiny checkpoints, and on whatever a backend runs."""

import json
import socket

import numpy as np
import pytest
import torch

from trt_kd.artifacts import Artifact, writing
from trt_kd.backends.base import Backend, Session
from trt_kd.checkpoints import load_model, save_model
from trt_kd.config import StageConfig, validate
from trt_kd.data.base import token_blocks
from trt_kd.errors import ArtifactError, ConfigError, DataError, ModelError, VerificationError
from trt_kd.stages import evaluate as stage
from trt_kd.stages.evaluate import EvaluateConfig, evaluate


class ImportedConfig(StageConfig):
    stage = "import"
    note: str = ""


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def config(text_file):
    source = {"kind": "text", "files": [str(text_file)]}
    data = {"source": source, "block_tokens": 32, "heldout_share": 0.3}
    settings = {"data": data, "blocks": 6, "items": 8, "batch_size": 8}
    return EvaluateConfig.model_validate(settings)


@pytest.fixture(scope="module")
def student(tmp_path_factory, make_model, tokenizer_dir):
    return checkpoint(tmp_path_factory.mktemp("student") / "s", make_model(seed=1), tokenizer_dir)


def checkpoint(out, model, tokenizer_from, note="student"):
    with writing(out, kind="checkpoint", config=ImportedConfig(note=note), inputs={}) as draft:
        save_model(model, draft.path, tokenizer_from=tokenizer_from)
    return Artifact.open(out)


def test_a_student_is_measured_against_its_teacher(config, student, teacher, tmp_path):
    from trt_kd.checkpoints import load_tokenizer

    result = evaluate(config, model=student, teacher=teacher, out=tmp_path / "out")

    tokenizer = load_tokenizer(teacher.path)
    blocks = torch.from_numpy(
        token_blocks(config.data, tokenizer, split="heldout", count=6, seed=config.seed)
    )
    with torch.inference_mode():
        log_p, log_q = (
            load_model(a.path, dtype="float32")(blocks).logits[:, :-1].double().log_softmax(-1)
            for a in (teacher, student)
        )
    kl_B = (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1)
    loss = -log_q.gather(-1, blocks[:, 1:, None]).mean().item()
    metrics = result.metrics
    assert metrics["kl_to_teacher_nats"] == pytest.approx(kl_B.mean().item(), rel=1e-4)
    assert metrics["kl_to_teacher_nats_stderr"] == pytest.approx(
        kl_B.std().item() / 6**0.5, rel=1e-3
    )
    assert metrics["loss_nats_per_token"] == pytest.approx(loss, rel=1e-4)
    assert metrics["perplexity"] == pytest.approx(np.exp(loss), rel=1e-3)
    assert metrics["heldout_tokens"] == 6 * 31
    assert {name: task["n"] for name, task in metrics["tasks"].items()} == {
        "docstring_continuation": 8,
        "facts": 8,
    }


def test_the_files_say_what_the_manifest_says(config, student, teacher, tmp_path):
    result = evaluate(config, model=student, teacher=teacher, out=tmp_path / "out")
    result.verify()
    record = json.loads((result.path / "evaluation.json").read_text())
    assert {key: record[key] for key in result.metrics} == dict(result.metrics)
    assert record["schema_version"] == 1
    assert record["backend"] == "transformers"
    per_block = record["per_block"]["kl_to_teacher_nats"]
    assert np.mean(per_block) == pytest.approx(result.metrics["kl_to_teacher_nats"])
    lines = (result.path / "items.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines]
    for name, task in result.metrics["tasks"].items():
        outcomes = [item["correct"] for item in items if item["task"] == name]
        assert np.mean(outcomes) == task["accuracy"]
    assert [item["item"] for item in items] == [*range(8), *range(8)]


def test_the_teacher_is_at_no_distance_from_itself_and_loads_once(
    config, teacher, tmp_path, monkeypatch
):
    loads = []
    real = stage.backend_for
    monkeypatch.setattr(stage, "backend_for", lambda a: loads.append(a.path) or real(a))
    metrics = evaluate(config, model=teacher, teacher=teacher, out=tmp_path / "out").metrics
    assert metrics["kl_to_teacher_nats"] == 0.0
    assert metrics["top1_agreement"] == 1.0
    assert metrics["kl_to_teacher_nats_stderr"] == 0.0
    assert metrics["perplexity"] > 1
    assert len(loads) == 1


def test_the_same_work_gives_the_same_numbers(config, student, teacher, tmp_path):
    first, second = (
        evaluate(config, model=student, teacher=teacher, out=tmp_path / name) for name in "ab"
    )
    assert first.key == second.key
    assert first.metrics == second.metrics


def test_the_rehearsal_is_small_and_passes(config, student, teacher, tmp_path):
    small = config.rehearsal()
    assert (small.blocks, small.items) == (2, 4)
    result = evaluate(small, model=student, teacher=teacher, out=tmp_path / "out")
    assert result.metrics["tasks"]["facts"]["n"] == 4


def test_one_block_has_no_standard_error(config, student, teacher, tmp_path):
    one = config.model_copy(update={"blocks": 1, "tasks": []})
    metrics = evaluate(one, model=student, teacher=teacher, out=tmp_path / "out").metrics
    assert metrics["kl_to_teacher_nats_stderr"] is None
    assert metrics["tasks"] == {}


class Broken(Session):
    vocab_size = 512

    def logits(self, tokens_BL):
        logits = np.zeros((*tokens_BL.shape, 512), dtype=np.float32)
        logits[0, 3, 7] = np.nan
        return logits

    def steps(self, prompts, new_tokens):
        yield from ()

    def close(self):
        pass


class BrokenBackend(Backend):
    kind: str = "broken"
    vocab_size: int = 512

    def load(self, directory):
        session = Broken()
        session.vocab_size = self.vocab_size
        return session


def run_broken(monkeypatch, config, student, teacher, out, **settings):
    real = stage.backend_for
    broken = BrokenBackend(**settings)
    monkeypatch.setattr(stage, "backend_for", lambda a: broken if a is student else real(a))
    evaluate(config, model=student, teacher=teacher, out=out)


def test_logits_that_are_not_finite_name_the_model(monkeypatch, config, student, teacher, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(VerificationError, match="not finite") as error:
        run_broken(monkeypatch, config, student, teacher, out)
    assert str(student.path) in str(error.value)
    assert not out.exists()
    assert not out.with_name("out.partial").exists()


def test_a_vocabulary_without_a_token_of_the_tokenizer_is_refused(
    monkeypatch, config, student, teacher, tmp_path
):
    with pytest.raises(ModelError, match=r"500 tokens .* 512; the tokenizer uses 512"):
        run_broken(monkeypatch, config, student, teacher, tmp_path / "out", vocab_size=500)


def test_another_tokenizer_is_refused(config, teacher, make_model, tokenizer_dir, tmp_path):
    other = tmp_path / "tokenizer"
    other.mkdir()
    for path in tokenizer_dir.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-5]
    (other / "tokenizer.json").write_text(json.dumps(content))
    model = checkpoint(tmp_path / "model", make_model(), other)
    with pytest.raises(ModelError, match="different tokenizers"):
        evaluate(config, model=model, teacher=teacher, out=tmp_path / "out")


def test_the_teacher_must_be_a_checkpoint(config, student, teacher, tmp_path):
    report = Artifact(teacher.path, teacher.manifest.model_copy(update={"kind": "report"}))
    with pytest.raises(ArtifactError, match="not a checkpoint"):
        evaluate(config, model=student, teacher=report, out=tmp_path / "out")


def test_too_little_text_is_an_error_before_anything_is_loaded(config, student, teacher, tmp_path):
    greedy = config.model_copy(update={"blocks": 10_000})
    with pytest.raises(DataError, match="holds"):
        evaluate(greedy, model=student, teacher=teacher, out=tmp_path / "out")


def test_a_name_that_is_almost_ours_is_refused_at_once():
    with pytest.raises(ConfigError, match="did you mean 'facts'"):
        validate(EvaluateConfig, {"tasks": ["fact"]}, where="recipe")
    with pytest.raises(ConfigError, match="stands twice"):
        validate(EvaluateConfig, {"tasks": ["facts", "facts"]}, where="recipe")
    assert EvaluateConfig(tasks=["hellaswag"]).tasks == ["hellaswag"]


def test_the_settings_are_fingerprinted_with_their_text(config, text_file, tmp_path):
    (tmp_path / "other.txt").write_text(text_file.read_text() + "\n\nOne more.")
    source = config.data.source.model_copy(update={"files": [str(tmp_path / "other.txt")]})
    other = config.model_copy(update={"data": config.data.model_copy(update={"source": source})})
    assert config.outside() == config.outside() != other.outside()
