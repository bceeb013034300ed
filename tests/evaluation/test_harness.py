"""Tasks through lm-eval: planted sessions get the scores they deserve, without a network."""

import re
import socket

import numpy as np
import pytest
import torch

from trt_kd.backends.base import Session
from trt_kd.checkpoints import load_tokenizer
from trt_kd.data.base import DataConfig
from trt_kd.errors import ConfigError, VerificationError
from trt_kd.evaluation import TASKS, harness
from trt_kd.evaluation.harness import run_items, run_named
from trt_kd.evaluation.session_lm import SessionLM
from trt_kd.evaluation.task import ChoiceItem

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Planted(Session):
    """Logits are 0 but for token ids that continue one of the known sequences."""

    def __init__(self, vocab_size, sequences=()):
        self.vocab_size = vocab_size
        self.sequences = sequences
        self.passes = []

    def logits(self, tokens_BL):
        self.passes.append(tokens_BL.copy())
        result = np.zeros((*tokens_BL.shape, self.vocab_size), dtype=np.float32)
        for row, tokens in enumerate(tokens_BL.tolist()):
            for known in self.sequences:
                for end in range(len(known) - 1):
                    if tokens[: end + 1] == known[: end + 1]:
                        result[row, end, known[end + 1]] = 9.0
        return result

    def steps(self, prompts, new_tokens):
        yield from ()

    def close(self):
        pass


class Real(Session):
    """A transformers model, with every pass recorded."""

    def __init__(self, model):
        self.model = model
        self.vocab_size = model.config.vocab_size
        self.passes = []

    def logits(self, tokens_BL):
        self.passes.append(tokens_BL.copy())
        with torch.inference_mode():
            return self.model(torch.from_numpy(tokens_BL)).logits.numpy()

    def steps(self, prompts, new_tokens):
        yield from ()

    def close(self):
        pass


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return load_tokenizer(tokenizer_dir)


@pytest.fixture
def data(text_file):
    source = {"kind": "text", "files": [str(text_file)]}
    return DataConfig.model_validate({"source": source, "heldout_share": 0.5})


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


def as_lm(session, tokenizer, batch_size=8, max_tokens=512):
    return SessionLM(session, tokenizer, batch_size=batch_size, max_tokens=max_tokens)


@pytest.mark.parametrize("name", TASKS.names())
def test_an_oracle_is_always_right(name, tokenizer, data):
    items = TASKS.load(name)().items(data, limit=40, seed=0)
    known = [tokenizer.encode(f"{item.prompt} {item.choices[item.answer]}") for item in items]
    result = run_items(as_lm(Planted(512, known), tokenizer), name, items)
    assert result.summary() == {"accuracy": 1.0, "stderr": 0.0, "n": 40}


@pytest.mark.parametrize("name", TASKS.names())
def test_a_model_that_knows_nothing_is_right_a_quarter_of_the_time(name, tokenizer, data):
    items = TASKS.load(name)().items(data, limit=160, seed=0)
    summary = run_items(as_lm(Planted(512), tokenizer), name, items).summary()
    assert summary["accuracy"] == pytest.approx(0.25, abs=0.1)
    p, n = summary["accuracy"], summary["n"]
    assert summary["stderr"] == pytest.approx(np.sqrt(p * (1 - p) / (n - 1)))


def test_outcomes_stand_in_the_order_of_the_items(tokenizer):
    items = [ChoiceItem(f"Note {n} is", ("a", "bb", "ccc", "dddd"), n % 4) for n in range(8)]
    known = [tokenizer.encode(f"Note {n} is dddd") for n in range(8)]
    result = run_items(as_lm(Planted(512, known), tokenizer), "mine", items)
    assert result.correct == (0, 0, 0, 1, 0, 0, 0, 1)


@pytest.mark.parametrize("prompt", ["{{ braces }} in", "12", "{% x"])
def test_a_prompt_is_text_and_never_a_template(prompt, tokenizer):
    session = Planted(512)
    run_items(as_lm(session, tokenizer), "mine", [ChoiceItem(prompt, ("a", "b", "c", "d"), 0)])
    ids = tokenizer.encode(prompt)
    assert session.passes[0][0, : len(ids)].tolist() == ids


def test_log_likelihoods_equal_a_computation_by_hand(make_model, tokenizer):
    model = make_model()
    items = [
        ChoiceItem("The capital of France", ("is Paris", "is", "was London then", "x"), 0),
        ChoiceItem("Open", ("the file, read every line", "a door", "it", "them all"), 1),
        ChoiceItem("A function returns a value; a generator", ("yields", "y", "no", "q"), 0),
    ]
    session = Real(model)
    lm = as_lm(session, tokenizer, batch_size=4)
    requests = [(item.prompt, f" {choice}") for item in items for choice in item.choices]

    class Request:
        def __init__(self, args):
            self.args = args

    values = lm.loglikelihood([Request(pair) for pair in requests])

    for (prompt, choice), (value, greedy) in zip(requests, values, strict=True):
        context, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + choice)
        with torch.inference_mode():
            log_p = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        places = range(len(context), len(whole))
        assert value == pytest.approx(sum(log_p[t - 1, whole[t]].item() for t in places), abs=1e-4)
        assert greedy == all(log_p[t - 1].argmax().item() == whole[t] for t in places)
    assert sum(map(len, session.passes)) < len(requests)


def test_white_space_at_the_end_of_a_prompt_belongs_to_the_choice(make_model, tokenizer):
    lm = as_lm(Real(make_model()), tokenizer)

    class Request:
        def __init__(self, *args):
            self.args = args

    (spaced, _), (plain, _) = lm.loglikelihood(
        [Request("Open ", "the file"), Request("Open", " the file")]
    )
    assert spaced == pytest.approx(plain, abs=1e-5)


def test_batches_do_not_change_a_score(make_model, tokenizer, data):
    items = TASKS.load("facts")().items(data, limit=12, seed=0)
    model = make_model()
    one = run_items(as_lm(Real(model), tokenizer, batch_size=1), "facts", items)
    many = run_items(as_lm(Real(model), tokenizer, batch_size=64), "facts", items)
    assert one == many


def test_a_context_that_is_too_long_is_cut_at_its_start(make_model, tokenizer):
    session = Real(make_model())
    lm = as_lm(session, tokenizer, max_tokens=8)
    run_items(lm, "mine", [ChoiceItem("word " * 40 + "end", ("a", "b", "c", "d"), 0)])
    assert {tokens.shape[1] for tokens in session.passes} == {8}


def test_rolling_likelihoods_count_every_token_once(make_model, tokenizer):
    model = make_model()
    text = "Open the file, read every line, strip the newline and count the words."

    class Request:
        args = (text,)

    ids = tokenizer.encode(text)
    (short,) = as_lm(Real(model), tokenizer, max_tokens=512).loglikelihood_rolling([Request()])
    with torch.inference_mode():
        log_p = model(torch.tensor([[tokenizer.eos_token_id, *ids]])).logits[0].log_softmax(-1)
    assert short == pytest.approx(sum(log_p[t, i].item() for t, i in enumerate(ids)), abs=1e-3)
    uniform = as_lm(Planted(512), tokenizer, max_tokens=5).loglikelihood_rolling([Request()])
    assert uniform == [pytest.approx(-len(ids) * np.log(512), rel=1e-5)]


def test_logits_that_are_not_finite_are_an_error(tokenizer):
    session = Planted(512)
    session.logits = lambda tokens: np.full((*tokens.shape, 512), np.nan, dtype=np.float32)
    with pytest.raises(VerificationError, match="not finite"):
        run_items(as_lm(session, tokenizer), "mine", [ChoiceItem("a", ("b", "c", "d", "e"), 0)])


def test_an_empty_task_is_the_callers_mistake(tokenizer):
    with pytest.raises(ValueError, match="no items"):
        run_items(as_lm(Planted(512), tokenizer), "mine", [])


def test_tasks_that_write_text_are_refused(tokenizer):
    with pytest.raises(ConfigError, match="generates text"):
        as_lm(Planted(512), tokenizer).generate_until([])


class Manager:
    """Stands for lm-eval's own task list."""

    all_tasks = ("arithmetic_by_name", "down")

    def load(self, names):
        if names == ["down"]:
            raise ConnectionError("Couldn't reach the hub")
        items = [ChoiceItem(f"Item {n}", ("a", "b", "c", "d"), 0) for n in range(9)]
        return {"tasks": {part: harness.ItemTask(part, items) for part in ("one", "two")}}


def test_a_group_of_lm_eval_counts_the_items_of_all_its_tasks(monkeypatch, tokenizer):
    monkeypatch.setattr(harness, "TaskManager", Manager)
    result = run_named(as_lm(Planted(512), tokenizer), "arithmetic_by_name", limit=3, seed=0)
    assert result.name == "arithmetic_by_name"
    assert len(result.correct) == 6


def test_an_unreachable_hub_and_an_unknown_task_are_two_line_errors(monkeypatch, tokenizer):
    monkeypatch.setattr(harness, "TaskManager", Manager)
    lm = as_lm(Planted(512), tokenizer)
    for name, what in (("down", "cannot be loaded"), ("hellaswagg", "unknown task")):
        with pytest.raises(Exception, match=what) as error:
            run_named(lm, name, limit=3, seed=0)
        assert re.fullmatch(r"[^\n]+\n  hint: [^\n]+", str(error.value))
