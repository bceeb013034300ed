"""``trt-kd draft``: what it prints and what it refuses."""

import json

import pytest
from typer.testing import CliRunner

from trt_kd.cli.app import app


@pytest.fixture(scope="module")
def student(make_student):
    return make_student(noise=0.01)


@pytest.fixture(autouse=True)
def logging_as_it_was(monkeypatch):
    """The command line sets up logging for its own process."""
    monkeypatch.setattr("trt_kd.cli.console.prepare_logging", lambda: None)


@pytest.fixture
def run(teacher, student, text_file):
    def call(*arguments, student=student):
        data = ["source.kind=text", f"source.files=[{text_file}]", "block_tokens=32"]
        given = [*(f"data.{setting}" for setting in data), "prompt_tokens=8", "new_tokens=8"]
        roles = ["--teacher", str(teacher.path), "--student", str(student.path), "prompts=3"]
        return CliRunner().invoke(app, ["draft", *given, *roles, *map(str, arguments)])

    return call


def test_json_has_both_ways_with_a_row_for_every_number_of_tokens(run):
    done = run("--json", "--cost-ratio", "0.1", "--tokens-ahead", "3", "precision=fp32")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["settings"]["new_tokens"] == 8
    for way in ("greedy", "sampled"):
        result = found[way]
        assert 0.1 < result["acceptance"] < 1
        assert result["acceptance_stderr"] > 0
        assert 3 <= result["tokens"] <= 24
        assert [row["tokens_ahead"] for row in result["steps"]] == [1, 2, 3]
        tokens = [row["tokens_per_step"] for row in result["steps"]]
        assert 1 < tokens[0] < 2
        assert tokens == sorted(tokens)
        first = result["steps"][0]
        assert first["speed_up"] == pytest.approx(tokens[0] / 1.1)
        assert first["tokens_per_step_if_alike"] == pytest.approx(1 + result["acceptance"])
    assert json.loads(run("--json", "--tokens-ahead", "3", "precision=fp32").stdout)["sampled"][
        "acceptance"
    ] == pytest.approx(found["sampled"]["acceptance"])


def test_a_teacher_drafts_for_itself_without_a_rejection(run, teacher):
    done = run("--json", "--tokens-ahead", "2", "precision=fp32", student=teacher)
    found = json.loads(done.stdout)
    assert [found[way]["acceptance"] for way in ("greedy", "sampled")] == pytest.approx([1, 1])


def test_the_table_says_the_best_number_where_the_cost_is_given(run):
    done = run("--cost-ratio", "0.05")
    assert done.exit_code == 0, done.output
    assert done.stdout.count("of the drafted tokens are accepted") == 2
    assert done.stdout.count("times as fast") == 2
    assert "times as fast" not in run().stdout


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["new_tokens=600"], "more than the context of 512"),
        (["prompt_tokens=33"], "at most data.block_tokens 32"),
        (["prompts=100000"], "holds"),
        (["temperatur=1"], "temperatur"),
    ],
)
def test_what_cannot_be_done_is_said_with_exit_code_2(run, arguments, what, monkeypatch):
    monkeypatch.setattr("trt_kd.teachers.online.load_model", None)
    done = run(*arguments)
    assert done.exit_code == 2
    assert what in done.output
    assert "Traceback" not in done.output
