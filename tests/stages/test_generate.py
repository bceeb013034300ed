"""What a teacher writes: its own choice, the same every time, resumed batch by batch."""

import json
import shutil

import pytest
import torch
from pydantic import ValidationError

from trt_kd.artifacts import Artifact, work_directory
from trt_kd.checkpoints import load_model, load_tokenizer
from trt_kd.data.base import documents
from trt_kd.errors import ConfigError, DataError, ModelError
from trt_kd.stages.distill import DistillConfig, distill
from trt_kd.stages.generate import GenerateConfig, generate
from trt_kd.teachers import writer as writer_module
from trt_kd.teachers.writer import Choice, continuations

PROMPT, NEW = 8, 6


@pytest.fixture(scope="module")
def settings(text_file):
    def make(**changes):
        plain = {
            "data": {"source": {"kind": "text", "files": [str(text_file)]}},
            "texts": 5,
            "prompt_tokens": PROMPT,
            "new_tokens": NEW,
            "batch_size": 2,
            "precision": "fp32",
        }
        return GenerateConfig.model_validate(plain | changes)

    return make


@pytest.fixture(scope="module")
def greedy(settings, teacher, tmp_path_factory):
    return generate(settings(), teacher=teacher, out=tmp_path_factory.mktemp("greedy") / "out")


def rows(artifact):
    lines = (artifact.path / "generated.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_greedy_text_is_the_teachers_likeliest_token_each_time(greedy, settings, teacher):
    tokenizer = load_tokenizer(teacher.path)
    model = load_model(teacher.path, dtype="float32")
    beginnings = {
        tokenizer.decode(ids[:PROMPT])
        for text in documents(settings().data, "train")
        if len(ids := tokenizer(text, add_special_tokens=False)["input_ids"]) >= PROMPT
    }
    texts = {
        tokenizer.decode(ids[:PROMPT]): ids[:PROMPT]
        for text in documents(settings().data, "train")
        for ids in [tokenizer(text, add_special_tokens=False)["input_ids"]]
    }
    assert len(rows(greedy)) == 5
    for row in rows(greedy):
        assert row["prompt"] in beginnings
        ids, new = list(texts[row["prompt"]]), []
        for _ in range(NEW):
            with torch.no_grad():
                new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
            if new[-1] == tokenizer.eos_token_id:
                break
        assert row["finished"] == (new[-1] == tokenizer.eos_token_id)
        assert row["text"] == tokenizer.decode(ids + new, skip_special_tokens=True)


def test_the_artifact_says_where_it_comes_from(greedy, teacher):
    assert greedy.manifest.kind == "text"
    assert greedy.manifest.inputs == {"teacher": teacher.key}
    assert teacher.key in greedy.manifest.lineage
    assert greedy.metrics["texts"] == 5
    assert greedy.metrics["new_tokens"] <= 5 * NEW
    greedy.verify()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_equal_settings_write_equal_texts_and_a_seed_other_ones(
    settings, teacher, tmp_path, temperature
):
    made = [
        rows(generate(settings(temperature=temperature, seed=seed), teacher=teacher, out=out))
        for seed, out in ((1, tmp_path / "a"), (1, tmp_path / "b"), (2, tmp_path / "c"))
    ]
    assert made[0] == made[1] != made[2]


def test_a_killed_run_ends_with_the_same_texts(settings, teacher, tmp_path, monkeypatch):
    config = settings(temperature=1.0)
    whole = generate(config, teacher=teacher, out=tmp_path / "whole")
    real, calls = continuations, []

    def counted(*args, **kwargs):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "continuations", counted)
        with pytest.raises(KeyboardInterrupt):
            generate(config, teacher=teacher, out=tmp_path / "cut")
    assert work_directory(tmp_path / "cut").is_dir()
    again = []
    monkeypatch.setattr(
        writer_module, "continuations", lambda *a, **k: again.append(1) or real(*a, **k)
    )
    made = generate(config, teacher=teacher, out=tmp_path / "cut")
    assert rows(made) == rows(whole)
    assert len(again) == 2
    assert not work_directory(tmp_path / "cut").exists()


def test_prompts_of_different_length_are_continued_as_if_alone(teacher):
    tokenizer = load_tokenizer(teacher.path)
    prompts = [[5, 6, 7, 8, 9], [10, 11]]
    choice = Choice(NEW, 0.0, 1.0, "fp32")

    def run(batch):
        model = load_model(teacher.path, dtype="float32")
        return continuations(model, tokenizer, batch, choice, seed=0)

    assert run(prompts) == [*run(prompts[:1]), *run(prompts[1:])]


def test_a_chat_is_written_down_as_a_whole(settings, teacher, tmp_path):
    shutil.copytree(teacher.path, tmp_path / "chatty")
    path = tmp_path / "chatty" / "tokenizer_config.json"
    template = "{% for m in messages %}User: {{ m.content }} Answer:{% endfor %}"
    content = json.loads(path.read_text(encoding="utf-8")) | {"chat_template": template}
    path.write_text(json.dumps(content), encoding="utf-8")
    chatty = Artifact(tmp_path / "chatty", teacher.manifest)
    made = generate(settings(chat=True, prompt_tokens=200), teacher=chatty, out=tmp_path / "out")
    for row in rows(made):
        assert row["prompt"].startswith("User: Note ")
        assert row["prompt"].endswith("Answer:")
        assert row["text"].startswith(row["prompt"])


def test_a_student_learns_from_what_was_written(settings, teacher, tmp_path):
    made = generate(settings(texts=40, new_tokens=24), teacher=teacher, out=tmp_path / "text")
    source = {"kind": "generated", "artifact": str(made.path)}
    config = DistillConfig.model_validate(
        {
            "data": {"source": source, "block_tokens": 16},
            "steps": 2,
            "batch_size": 2,
            "task_weight": 1.0,
            "response_weight": 0.0,
            "precision": "fp32",
            "monitor": None,
        }
    )
    assert made.key in config.outside()["data"]
    student = distill(config, student=teacher, out=tmp_path / "student")
    assert student.metrics["steps"] == 2


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"new_tokens": 600}, ConfigError, "more than the teacher's context of 512"),
        ({"texts": 10_000}, DataError, "documents of at least 8 tokens for 10000 texts"),
        ({"chat": True, "prompt_tokens": 3}, DataError, "documents of at most 3 tokens"),
        ({"chat": True, "prompt_tokens": 200}, ModelError, "no chat template"),
    ],
)
def test_what_cannot_be_written_is_told_in_two_lines(
    settings, teacher, tmp_path, changes, error, message
):
    with pytest.raises(error, match=message) as caught:
        generate(settings(**changes), teacher=teacher, out=tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 2


def test_an_option_without_effect_is_refused(settings):
    with pytest.raises(ValidationError, match="top_p has no effect"):
        settings(top_p=0.9)
