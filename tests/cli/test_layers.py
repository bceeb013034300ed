"""``trt-kd layers``: the matrix, the pairs, the warning, the picture, what it refuses."""

import json

import pytest
from typer.testing import CliRunner

from trt_kd.artifacts import Artifact, writing
from trt_kd.checkpoints import load_model, save_model
from trt_kd.cli.app import app
from trt_kd.config import StageConfig


class PrunedConfig(StageConfig):
    """Stands for the stage that made a student."""

    stage = "prune"


@pytest.fixture(scope="module")
def student(tmp_path_factory, teacher):
    """The teacher's first and last layer."""
    out = tmp_path_factory.mktemp("student") / "student"
    model = load_model(teacher.path)
    del model.model.layers[1:3]
    model.config.num_hidden_layers = 2
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    if hasattr(model.config, "layer_types"):
        model.config.layer_types = model.config.layer_types and model.config.layer_types[:2]
    with writing(
        out, kind="checkpoint", config=PrunedConfig(), inputs={"source": teacher}
    ) as draft:
        save_model(model, draft.path, tokenizer_from=teacher.path)
        draft.metrics["kept_layers"] = [0, 3]
    return Artifact.open(out)


@pytest.fixture(autouse=True)
def logging_as_it_was(monkeypatch):
    """The command line sets up logging for its own process."""
    monkeypatch.setattr("trt_kd.cli.console.prepare_logging", lambda: None)


@pytest.fixture
def run(teacher, student, text_file):
    def call(*arguments):
        data = ["source.kind=text", f"source.files=[{text_file}]", "block_tokens=32"]
        given = [f"data.{setting}" for setting in data]
        whole = ["layers", str(teacher.path), str(student.path), *given, "--tokens", "512"]
        return CliRunner().invoke(app, [*whole, *map(str, arguments)])

    return call


def test_json_has_the_matrix_and_every_pair_with_the_best_of_its_row(run):
    done = run("pairs=kept", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [len(found["cka"]), len(found["cka"][0])] == [2, 4]
    assert found["cka"][0][0] == pytest.approx(1.0)
    first, second = found["pairs"]
    assert (first["student"], first["teacher"], first["best_teacher"]) == (0, 0, 0)
    assert (second["student"], second["teacher"]) == (1, 3)
    for pair in found["pairs"]:
        row = found["cka"][pair["student"]]
        assert pair["best_cka"] == max(row)
        assert pair["warnings"] == (["weak_pair"] if pair["cka"] < 0.9 * max(row) else [])


def test_the_table_warns_of_a_weak_pair_with_a_remedy_and_draws(run, tmp_path):
    done = run("pairs=[[0, 3], [0, 0]]", "--figure", tmp_path / "cka.svg")
    assert done.exit_code == 0, done.output
    assert "warning: weak_pair: [0, 3] has a CKA of" in done.stdout
    assert "pair layer 0 with 0" in done.stdout
    assert done.stdout.count("weak_pair") == 1
    assert "<svg" in (tmp_path / "cka.svg").read_text(encoding="utf-8")


def test_a_picture_can_be_png_and_pairs_measured(run, tmp_path):
    done = run("pairs=cka", "--figure", tmp_path / "cka.png")
    assert done.exit_code == 0, done.output
    assert "weak_pair" not in done.stdout
    assert (tmp_path / "cka.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["pairs=[[0, 9]]"], "layer 9 of the teacher, which has 4"),
        (["pairs=nearest"], "pairs"),
        (["--figure", "cka.gif"], "cannot be written as '.gif'"),
        (["--figure", "none/cka.svg"], "none is no folder"),
        (["--tokens", "100000000"], "holds"),
    ],
)
def test_what_cannot_be_done_is_said_with_exit_code_2(run, arguments, what, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trt_kd.checkpoints.load_model", None)
    done = run(*arguments)
    assert done.exit_code == 2
    assert what in done.output
    assert "Traceback" not in done.output
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_written_takes_no_table_with_it(run):
    done = run("--figure", "/proc/cka.svg")
    assert done.exit_code == 2
    assert "linear CKA" in done.stdout
    assert "error: /proc/cka.svg cannot be written" in done.stderr
