"""Texts that think before they answer: which are kept, and what is said of the others."""

import json
import shutil

import pytest
import torch
from pydantic import ValidationError

from trt_kd.artifacts import Artifact
from trt_kd.checkpoints import load_model, load_tokenizer
from trt_kd.data.base import DataConfig, documents
from trt_kd.errors import DataError
from trt_kd.stages.generate import GenerateConfig, generate
from trt_kd.teachers import writer as writer_module
from trt_kd.teachers.traces import Traces
from trt_kd.teachers.writer import Written, answer_nats

TEXTS = [
    "<think>The river runs through it.</think> Paris.",
    "The template opened. So it is Paris.</think> Paris.",
    "<think>It goes on",
    "<think>Too many words are many words and many words too many.</think> Paris.",
    "No thought at all.",
]


@pytest.fixture(scope="module")
def settings(text_file):
    def make(traces, **changes):
        plain = {
            "data": {"source": {"kind": "text", "files": [str(text_file)]}},
            "texts": 5,
            "prompt_tokens": 8,
            "new_tokens": 64,
            "batch_size": 2,
            "precision": "fp32",
            "traces": traces,
        }
        return GenerateConfig.model_validate(plain | changes)

    return make


@pytest.fixture
def says(monkeypatch, teacher):
    """Let the teacher write given texts, in order; the third is cut off."""
    tokenizer = load_tokenizer(teacher.path)

    def given(*texts):
        left = list(texts)

        def written(model, tokenizer_, prompts, choice, *, seed):
            made = [left.pop(0) for _ in prompts]
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in made]
            ended = ["goes on" not in text for text in made]
            return [
                Written(row + [tokenizer.eos_token_id] * end, end)
                for row, end in zip(ids, ended, strict=True)
            ]

        monkeypatch.setattr(writer_module, "continuations", written)

    return given


def rows(artifact):
    lines = (artifact.path / "generated.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_only_whole_delimited_traces_of_bounded_length_are_kept(settings, teacher, says, tmp_path):
    says(*TEXTS)
    made = generate(settings({"most_tokens": 20}), teacher=teacher, out=tmp_path / "out")
    found = rows(made)
    assert [(row["thought"], row["answer"]) for row in found] == [
        ("The river runs through it.", " Paris."),
        ("The template opened. So it is Paris.", " Paris."),
    ]
    assert all(row["text"].startswith(row["prompt"]) for row in found)
    assert [row["text"].removeprefix(row["prompt"]) for row in found] == TEXTS[:2]
    counts = {n.removeprefix("left_out_"): v for n, v in made.metrics.items() if "left_out" in n}
    assert counts == {
        "unfinished": 1,
        "undelimited": 1,
        "too_long": 1,
        "wrong": 0,
        "unsupported": 0,
    }
    assert made.metrics["texts"] == 2
    source = {"kind": "generated", "artifact": str(made.path)}
    data = DataConfig.model_validate({"source": source, "heldout_share": 1e-9})
    assert documents(data, "train") == [row["text"] for row in found]


def test_a_trace_stays_where_its_answer_is_likelier_with_it(settings, teacher, says, tmp_path):
    """The gain is the difference of two plain readings of the answer."""
    says(*TEXTS)
    wanted = {"most_tokens": 20, "least_gain_nats": -100.0}
    found = rows(generate(settings(wanted), teacher=teacher, out=tmp_path / "all"))
    model, tokenizer = load_model(teacher.path), load_tokenizer(teacher.path)

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def nats(context, answer):
        total = 0.0
        for n, token in enumerate(answer):
            with torch.no_grad():
                logits = model(torch.tensor([context + answer[:n]])).logits[0, -1].double()
            total += logits.log_softmax(-1)[token].item() / len(answer)
        return total

    for row, begin in zip(found, ("<think>", ""), strict=True):
        prompt, answer = ids(row["prompt"]), ids(row["answer"])
        with_it = nats(prompt + ids(f"{begin}{row['thought']}</think>"), answer)
        without = nats(prompt + ids(f"{begin}</think>"), answer)
        assert row["gain_nats"] == pytest.approx(with_it - without, abs=1e-4)
    gains = sorted(row["gain_nats"] for row in found)
    assert gains[0] < gains[1]
    says(*TEXTS)
    limit = wanted | {"least_gain_nats": sum(gains) / 2}
    made = generate(settings(limit), teacher=teacher, out=tmp_path / "half")
    assert [row["gain_nats"] for row in rows(made)] == [pytest.approx(gains[1])]
    assert made.metrics["left_out_unsupported"] == 1


def test_an_answer_s_log_probability_is_the_mean_over_its_tokens(make_model):
    model = make_model(num_hidden_layers=2)
    with torch.no_grad():
        log_p = model(torch.tensor([[5, 6, 7, 8]])).logits[0].log_softmax(-1)
    expected = (log_p[1, 7] + log_p[2, 8]) / 2
    assert answer_nats(model, [5, 6], [7, 8], "fp32") == pytest.approx(expected.item(), rel=1e-5)


def test_where_no_text_is_kept_the_reasons_are_counted(settings, teacher, says, tmp_path):
    says(*TEXTS[2:], *TEXTS[2:4])
    with pytest.raises(DataError, match=r"none of 5 texts is kept: 2 unfinished, 1 undelim"):
        generate(settings({"most_tokens": 20}), teacher=teacher, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "written",
    [
        "<think>a</think>",
        "<think> </think>b",
        "a b",
        "<think>a<think>b</think>c",
        "<think>a</think>b</think>c",
        "before <think>a</think>b",
        "",
    ],
)
def test_a_text_that_is_not_one_trace_and_one_answer_is_none(written):
    assert Traces().split(written) is None


def test_the_opening_may_be_the_template_s():
    assert Traces().split("<think>a</think>b") == ("a", "b", True)
    assert Traces().split("\n<think>a</think>b") == ("a", "b", True)
    assert Traces().split("a</think>b") == ("a", "b", False)
    assert Traces(open="[", close="]").split("[a]b") == ("a", "b", True)


@pytest.mark.parametrize(
    ("traces", "message"),
    [
        ({"most_tokens": 64}, "most_tokens 64 has no effect: it must be below new_tokens 64"),
        ({"most_tokens": 8, "open": " "}, "two different texts"),
        ({"most_tokens": 8, "open": "|", "close": "|"}, "two different texts"),
        ({"most_tokens": 8, "least_gain_nats": float("nan")}, "finite"),
        ({"most_tokens": 8, "answer_field": "a"}, "text text has no fields"),
        ({"most_tokens": 8, "answer_pattern": "(a)"}, "has no effect: there is no answer_field"),
        ({"most_tokens": 8, "answer_field": "a", "answer_pattern": "("}, "no regular expression"),
        ({"most_tokens": 8, "answer_field": "a", "answer_pattern": "a"}, "no group in parenth"),
    ],
)
def test_settings_without_sense_or_effect_are_refused(settings, traces, message):
    with pytest.raises(ValidationError, match=message):
        settings(traces)


def test_a_rehearsal_does_not_ask_a_cut_twin_to_think(settings):
    assert settings({"most_tokens": 8}).rehearsal().traces is None


@pytest.fixture
def questions(tmp_path):
    """Five questions, the known answer beside four of them, and what a file of them is called."""
    known = ["Paris.", "12", 12, "Oslo", None]
    lines = [
        json.dumps({"text": f"Question {n}?"} | ({} if answer is None else {"reply": answer}))
        for n, answer in enumerate(known)
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return {"source": {"kind": "jsonl", "files": [str(path)]}, "heldout_share": 1e-9}


@pytest.fixture
def chatty(teacher, tmp_path):
    shutil.copytree(teacher.path, tmp_path / "chatty")
    path = tmp_path / "chatty" / "tokenizer_config.json"
    template = "{% for m in messages %}Q: {{ m.content }} A:{% endfor %}"
    content = json.loads(path.read_text(encoding="utf-8")) | {"chat_template": template}
    path.write_text(json.dumps(content), encoding="utf-8")
    return Artifact(tmp_path / "chatty", teacher.manifest)


@pytest.fixture
def answered(settings, questions, chatty, monkeypatch, tmp_path):
    """Let the teacher end every question as it is told; return what is kept."""
    tokenizer = load_tokenizer(chatty.path)

    def make(said, **traces):
        def written(model, tokenizer_, prompts, choice, *, seed):
            asked = [int(tokenizer.decode(ids).split("Question ")[1][0]) for ids in prompts]
            texts = [f"<think>Because.</think>{said[n]}" for n in asked]
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            return [Written([*row, tokenizer.eos_token_id], True) for row in ids]

        monkeypatch.setattr(writer_module, "continuations", written)
        wanted = {"most_tokens": 20, "answer_field": "reply"} | traces
        config = settings(wanted, chat=True, prompt_tokens=200, data=questions)
        return generate(config, teacher=chatty, out=tmp_path / "out")

    return make


@pytest.mark.parametrize(
    ("pattern", "said", "kept"),
    [
        (None, [" Paris.\n", "12", " 12 ", "Bergen", "anything"], {0, 1, 2, 4}),
        (r"is (\w+)", ["Paris is it", "is 3. is 12", "is 12, is 3", "is Oslo", "none"], {1, 3, 4}),
    ],
)
def test_a_trace_stays_only_where_its_answer_is_the_known_one(answered, pattern, said, kept):
    """What has no known answer is not compared."""
    made = answered(said, answer_pattern=pattern)
    assert {int(row["prompt"].split("Question ")[1][0]) for row in rows(made)} == kept
    assert made.metrics["left_out_wrong"] == 5 - len(kept)
    assert made.metrics["known_answers"] == len(kept) - 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"text": "a", "id": 1}], "no line of .* holds anything in field 'reply'"),
        ([{"text": "a", "reply": "1"}, {"text": "a", "reply": "2"}], "says both '1' and '2'"),
    ],
)
def test_known_answers_that_are_missing_or_at_odds_are_told(
    settings, chatty, tmp_path, lines, message
):
    path = tmp_path / "odd.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    data = {"source": {"kind": "jsonl", "files": [str(path)]}, "heldout_share": 1e-9}
    traces = {"most_tokens": 20, "answer_field": "reply"}
    with pytest.raises(DataError, match=message) as caught:
        generate(settings(traces, chat=True, data=data), teacher=chatty, out=tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 2


def test_known_answers_need_whole_questions(settings, questions):
    with pytest.raises(ValidationError, match="write chat: true"):
        settings({"most_tokens": 20, "answer_field": "reply"}, data=questions)
