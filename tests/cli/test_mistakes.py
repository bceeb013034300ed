"""What a user can get wrong: two lines that say what and how to mend it, exit code 2, no loss."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from trt_kd.cli.app import app

RECIPE = {
    "name": "mine",
    "import": {"source": "{tmp}/model"},
    "prune": {"axes": [{"kind": "ffn", "size": 64}]},
    "distill": {"steps": 1},
    "export": {"deploy": {"lane": "hf-unified"}},
}
FILES = {
    "empty.yaml": b"",
    "list.yaml": b"- a\n",
    "broken.yaml": b"a: [1\nb: 2",
    "latin.yaml": "name: café".encode("latin-1"),
    "text.txt": b"Nothing but text.",
}


@pytest.fixture
def place(tmp_path, teacher):
    """A folder with a recipe, files that are none, and a model to spoil."""
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    recipe = yaml.safe_dump(RECIPE).replace("{tmp}", str(tmp_path))
    (tmp_path / "good.yaml").write_text(recipe, encoding="utf-8")
    shutil.copytree(teacher.path, tmp_path / "model")
    (tmp_path / "model" / "trt_kd.json").unlink()
    return tmp_path


def tree(folder: Path) -> dict[str, bytes]:
    """All files, but those that only keep others out."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path): path.read_bytes() for path in paths}


def told(place, teacher, *arguments):
    """What the command says; by the way, that it says so as it should."""
    given = [str(text).format(tmp=place, teacher=teacher.path) for text in arguments]
    before = tree(place), tree(teacher.path)
    done = CliRunner().invoke(app, given)
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == 2
    assert (tree(place), tree(teacher.path)) == before
    lines = done.stderr.splitlines()
    assert len(lines) == 2, done.stderr
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("  ")
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["plan", "{tmp}/none.yaml"], "none.yaml cannot be read: No such file"),
        (["plan", "{tmp}"], "cannot be read: Is a directory"),
        (["plan", "{tmp}/empty.yaml"], "holds nothing, not a mapping"),
        (["plan", "{tmp}/list.yaml"], "holds list, not a mapping"),
        (["plan", "{tmp}/broken.yaml"], "is not valid YAML"),
        (["plan", "{tmp}/latin.yaml"], "is not UTF-8"),
        (["import", "--config", "{tmp}", "--out", "{tmp}/out"], "cannot be read: Is a directory"),
    ],
)
def test_a_file_that_holds_no_settings_is_named(place, teacher, arguments, what):
    assert what in told(place, teacher, *arguments)


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("distill.steps=-1", "distill.steps: Input should be greater than 0, got -1"),
        ("distil.steps=1", "distil: Extra inputs are not permitted"),
        ("distill.loss=forward_lk", "did you mean 'forward_kl'?"),
        ("nonsense", "'nonsense' is not an override"),
        ("distill.steps.a=3", "reaches into a plain value at 'a'"),
        ("distill.steps.a.b=3", "reaches into a plain value at 'a'"),
        ("prune.axes.7.size=3", "'7' is no index of a list of 1"),
        ("prune.axes=[ffn", "override 'prune.axes=[ffn' is not valid YAML"),
        ("seed=one", "seed: Input should be a valid integer"),
        ("prune.axes.0.size=4096", "4096 is larger than the model's 128"),
        ("import.source=/none", "import.source /none does not exist"),
        ("import.source={tmp}/text.txt", "is neither a folder nor a .gguf file"),
        ("name=../out", "name: String should match pattern"),
        ("export.also={{../out: {{lane: onnx}}}}", "export.also.../out.[key]: String should match"),
        (
            "latency={{lanes: {{../out: ort-genai}}}}",
            "latency.lanes.../out.[key]: String should match",
        ),
    ],
)
def test_a_setting_that_cannot_be_is_named(place, teacher, override, what):
    assert what in told(place, teacher, "plan", "{tmp}/good.yaml", override)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["show", "{tmp}/none"], "none does not exist"),
        (["show", "{tmp}/text.txt"], "text.txt is not a folder"),
        (["show", "{tmp}/model"], "holds no trt_kd.json"),
        (["gate", "{teacher}"], "holds a checkpoint, not a report"),
        (["evaluate", "--model", "{tmp}/none", "--teacher", "{teacher}", "--out", "{tmp}/out"],
         "none does not exist"),
        (["layers", "{teacher}", "{tmp}/none"], "none does not exist"),
        (["sensitivity", "--dry-run", "--source", "{tmp}/none", "--formats", "fp8"],
         "config.json cannot be read"),
        (["benchmark", "--input", "a", "--out", "{tmp}/out"], "is not ROLE=FOLDER"),
        (["benchmark", "--input", "out={teacher}", "--out", "{tmp}/out"], "out is no role"),
        (["benchmark", "--input", "a={teacher}", "--input", "a={teacher}", "--out", "{tmp}/out"],
         "a is given twice"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_such_artifact_is_named(place, teacher, arguments, what):
    assert what in told(place, teacher, *arguments)


@pytest.mark.parametrize(
    ("out", "what"),
    [
        ("{teacher}", "exists already"),
        ("{teacher}/out", "lies in the artifact"),
        ("{tmp}/text.txt", "exists already"),
        ("{tmp}/text.txt/out", "cannot be written"),
        ("/proc/none/out", "cannot be written"),
    ],
)
def test_a_place_that_cannot_be_written_is_named(place, teacher, out, what):
    assert what in told(place, teacher, "import", "source={tmp}/model", "--out", out)


def changed(**settings):
    """Writes a ``config.json`` with other settings, None for those left out."""

    def write(model: Path) -> None:
        config = json.loads((model / "config.json").read_text()) | settings
        kept = {name: value for name, value in config.items() if value is not None}
        (model / "config.json").write_text(json.dumps(kept))

    return write


def written(name: str, content: bytes):
    """Writes a file of the model."""
    return lambda model: (model / name).write_bytes(content)


SPOILT = {
    "no model_type": (changed(model_type=None), "config.json has no model_type"),
    "a foreign model_type": (changed(model_type="martian"), "'martian' is not supported"),
    "no size": (changed(hidden_size=None), "has no 'hidden_size'"),
    "a size in words": (changed(num_hidden_layers="four"), "says num_hidden_layers 'four'"),
    "a size below 1": (changed(num_hidden_layers=-2), "says num_hidden_layers -2"),
    "no heads": (changed(num_attention_heads=0), "says num_attention_heads 0"),
    "sizes of another model": (changed(hidden_size=128), "its config.json speaks of"),
    "half a config": (written("config.json", b'{"model_type"'), "is not valid JSON"),
    "a config in Latin-1": (written("config.json", b'{"a": "\xe9"}'), "is not valid JSON"),
    "a config that is a list": (written("config.json", b"[]"), "does not hold a JSON object"),
    "an empty weight file": (written("model.safetensors", b""), "is not a safetensors file"),
    "weights that are text": (written("model.safetensors", b"0" * 99), "header is longer"),
    "a header that is a list": (
        written("model.safetensors", (2).to_bytes(8, "little") + b"[]"), "no JSON object",
    ),
    "no tokenizer": (lambda model: (model / "tokenizer.json").unlink(), "holds no tokenizer"),
    "half a tokenizer": (written("tokenizer.json", b"{"), "tokenizer.json is not valid JSON"),
    "no weight in the file": (
        written("model.safetensors", (2).to_bytes(8, "little") + b"{}"), "holds 0 weights",
    ),
    "an index of nothing": (
        written("model.safetensors.index.json", b'{"weight_map": [1]}'), "has no weight_map",
    ),
    "an index of numbers": (
        written("model.safetensors.index.json", b'{"weight_map": {"a": 3}}'), "has no weight_map",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_a_damaged_model_is_not_imported(place, teacher, name):
    spoil, what = SPOILT[name]
    spoil(place / "model")
    assert what in told(place, teacher, "import", "source={tmp}/model", "--out", "{tmp}/out")
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "what", "where"),
    [
        (["prune", "--nope"], "no such option: --nope", " prune --help"),
        (["prun"], "no such command 'prun'", " --help"),
        (["prune"], "missing option '--source'", " prune --help"),
        (["run"], "missing argument", " run --help"),
        (["gate", "a", "b"], "got unexpected extra argument", " gate --help"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_told_like_any_mistake(
    place, teacher, arguments, what, where
):
    said = told(place, teacher, *arguments)
    assert what in said
    assert said.rstrip().endswith(where)


def test_nothing_at_all_shows_the_help_and_ends_like_a_mistake():
    done = CliRunner().invoke(app, [])
    assert done.exit_code == 2
    assert "Exit codes" in done.output
