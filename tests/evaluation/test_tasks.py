"""Laws of every task of our own, and the facts that one of them asks."""

import json
from collections import Counter
from pathlib import Path

import pytest

import trt_kd.evaluation
from trt_kd.data.base import DataConfig, documents
from trt_kd.errors import DataError
from trt_kd.evaluation import TASKS
from trt_kd.evaluation.task import ChoiceTask


@pytest.fixture
def data(text_file):
    source = {"kind": "text", "files": [str(text_file)]}
    return DataConfig.model_validate({"source": source, "heldout_share": 0.5})


@pytest.fixture(params=TASKS.names())
def task(request):
    return TASKS.load(request.param)()


def test_a_task_is_registered_under_its_kind(task):
    assert isinstance(task, ChoiceTask)
    assert TASKS.load(task.kind) is type(task)
    assert TASKS.summary(task.kind)


def test_items_have_four_different_choices_and_a_prompt_that_ends_in_no_space(task, data):
    for item in task.items(data, limit=60, seed=0):
        assert len(item.choices) == len(set(item.choices)) == 4
        assert item.prompt == item.prompt.strip() != ""
        assert all(choice == choice.strip() != "" for choice in item.choices)


def test_the_answer_stands_equally_often_in_every_place(task, data):
    places = Counter(item.answer for item in task.items(data, limit=60, seed=0))
    assert [places[place] for place in range(4)] == [15] * 4


def test_the_limit_cuts_and_never_pads(task, data):
    everything = task.items(data, limit=10**6, seed=0)
    assert task.items(data, limit=7, seed=0) == everything[:7]
    assert len(task.items(data, limit=len(everything) + 1, seed=0)) == len(everything)


def test_the_same_seed_gives_the_same_items(task, data):
    assert task.items(data, limit=20, seed=3) == task.items(data, limit=20, seed=3)


def test_no_prompt_comes_twice(task, data):
    prompts = [item.prompt for item in task.items(data, limit=10**6, seed=0)]
    assert len(set(prompts)) == len(prompts)


def test_continuations_come_from_held_out_text_only(data):
    task = TASKS.load("docstring_continuation")()
    heldout = [" ".join(text.split()) for text in documents(data, "heldout")]
    for item in task.items(data, limit=20, seed=0):
        truth = f"{item.prompt} {item.choices[item.answer]}"
        assert any(text.startswith(truth) for text in heldout)
        for place, choice in enumerate(item.choices):
            assert any(f" {choice}" in text for text in heldout)
            if place != item.answer:
                assert f"{item.prompt} {choice}" not in heldout


def test_continuations_need_four_documents(tmp_path):
    (tmp_path / "a.txt").write_text("Too short.\n\nToo short as well.")
    source = {"kind": "text", "files": [str(tmp_path / "a.txt")]}
    data = DataConfig.model_validate({"source": source, "heldout_share": 0.999})
    with pytest.raises(DataError, match="needs 4 held-out documents of 18 words"):
        TASKS.load("docstring_continuation")().items(data, limit=4, seed=0)


def test_there_are_at_least_150_well_formed_facts_on_many_topics():
    path = Path(trt_kd.evaluation.__file__).with_name("facts.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 150
    assert len({row["topic"] for row in rows}) >= 10
    assert all(set(row) == {"topic", "prompt", "choices", "answer"} for row in rows)


def test_no_fact_has_a_choice_that_begins_another_choice():
    for item in TASKS.load("facts")().items(DataConfig(), limit=10**6, seed=0):
        starts = [(a, b) for a in item.choices for b in item.choices if a != b and b.startswith(a)]
        assert not starts, item.prompt
