"""The sensitivity stage and its command on the tiny teacher."""

import json

import pytest
from typer.testing import CliRunner

from trt_kd.artifacts import Artifact
from trt_kd.cli.app import app
from trt_kd.config import validate
from trt_kd.errors import ArtifactError, ConfigError, ModelError
from trt_kd.stages import sensitivity as stage
from trt_kd.stages.quantize import QuantizeConfig, quantize
from trt_kd.stages.sensitivity import SensitivityConfig, sensitivity

FORMATS = ["fp8", "int8", {"kind": "int4_awq", "block_size": 64}]
LABELS = ["fp8", "int8", "int4_awq block_size=64"]


@pytest.fixture(scope="module")
def settings(text_file):
    return {
        "formats": FORMATS,
        "data": {"source": {"kind": "text", "files": [str(text_file)]}, "block_tokens": 32},
        "calibration_tokens": 128,
        "heldout_blocks": 2,
    }


@pytest.fixture(scope="module")
def config(settings):
    return validate(SensitivityConfig, settings, where="sensitivity")


@pytest.fixture(scope="module")
def made(config, teacher, tmp_path_factory):
    return sensitivity(config, source=teacher, out=tmp_path_factory.mktemp("s") / "s")


def test_every_layer_has_a_cost_in_every_format(made, teacher):
    found = json.loads((made.path / "sensitivity.json").read_text())["formats"]
    assert list(found) == LABELS
    for name, one in found.items():
        assert len(one["layer_kl_nats"]) == 4
        assert all(0 < cost < 0.5 for cost in one["layer_kl_nats"])
        assert one["whole_kl_nats"] > 0
        blocks = one["layer_kl_nats_by_block"][2]
        assert len(blocks) == 2
        assert one["layer_kl_nats"][2] == pytest.approx(sum(blocks) / 2)
        assert made.metrics["layer_kl_nats"][name] == one["layer_kl_nats"]
    assert made.manifest.inputs == {"source": teacher.key}
    made.verify()


def test_table_and_figure_stand_beside_the_numbers(made):
    table = (made.path / "sensitivity.md").read_text()
    assert "| layer | fp8 | int8 | int4_awq block_size=64 |" in table
    assert table.count("\n| ") == 2 + 4 + 2
    assert (made.path / "sensitivity.svg").read_text().count("<svg") == 1


def test_the_same_work_gives_the_same_files(made, config, teacher, tmp_path):
    again = sensitivity(config, source=teacher, out=tmp_path / "again")
    assert again.key == made.key
    assert again.manifest.files == made.manifest.files


def test_a_killed_run_goes_on_with_the_cells_that_are_missing(
    made, config, teacher, tmp_path, monkeypatch
):
    asked = []
    plain = stage._Subject._in

    def killed_at_the_seventh(self, quantization):
        asked.append(quantization.kind)
        if len(asked) == 7:
            raise KeyboardInterrupt
        return plain(self, quantization)

    monkeypatch.setattr(stage._Subject, "_in", killed_at_the_seventh)
    with pytest.raises(KeyboardInterrupt):
        sensitivity(config, source=teacher, out=tmp_path / "s")
    assert asked == ["fp8"] * 5 + ["int8"] * 2
    finished = sensitivity(config, source=teacher, out=tmp_path / "s")
    assert len(asked) == 7 + 4 + 5
    assert "fp8" not in asked[7:]
    assert finished.manifest.files == made.manifest.files
    assert list(tmp_path.iterdir()) == [finished.path]


def test_the_whole_is_what_quantizing_the_model_costs(made, settings, teacher, tmp_path):
    single = {key: value for key, value in settings.items() if key != "formats"}
    config = QuantizeConfig.model_validate(single | {"format": "fp8"})
    quantized = quantize(config, source=teacher, out=tmp_path / "q")
    whole = made.metrics["whole_kl_nats"]["fp8"]
    assert whole == pytest.approx(quantized.metrics["kl_to_source_nats"], rel=0.05)


def test_formats_that_do_not_fit_are_all_named_before_any_work(settings, teacher, tmp_path):
    formats = ["int4_awq", "fp8"]
    config = validate(SensitivityConfig, settings | {"formats": formats}, where="sensitivity")
    with pytest.raises(ModelError, match="int4_awq: the input width 64") as caught:
        sensitivity(config, source=teacher, out=tmp_path / "s")
    assert "of o_proj" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("formats", [[], ["fp8", {"kind": "fp8"}], ["fp7"]])
def test_no_format_twice_or_unknown(settings, formats):
    with pytest.raises(ConfigError, match="formats"):
        validate(SensitivityConfig, settings | {"formats": formats}, where="sensitivity")


def test_only_a_checkpoint_is_measured(made, config, tmp_path):
    with pytest.raises(ArtifactError, match="holds a sensitivity, not a checkpoint"):
        sensitivity(config, source=made, out=tmp_path / "s")


@pytest.fixture
def run(teacher, text_file, monkeypatch):
    monkeypatch.setattr("trt_kd.cli.console.prepare_logging", lambda: None)

    def call(*arguments):
        data = ["source.kind=text", f"source.files=[{text_file}]", "block_tokens=32"]
        given = [f"data.{setting}" for setting in data]
        whole = ["sensitivity", "--source", teacher.path, "calibration_tokens=64", *given]
        return CliRunner().invoke(app, [*map(str, whole), *map(str, arguments)])

    return call


def test_the_command_prints_the_table_and_writes_the_artifact(run, tmp_path):
    done = run("--formats", "fp8,int8", "--out", tmp_path / "s")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert "layer" in lines[2]
    assert "fp8" in lines[2]
    assert "int8" in lines[2]
    assert Artifact.open(tmp_path / "s", expect="sensitivity")


def test_a_dry_run_says_what_it_would_cost_and_loads_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr("trt_kd.stages.sensitivity.load_model", None)
    done = run("--formats", "fp8,int8", "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    cost = json.loads(done.stdout)
    assert cost["cells"] == 2 * 5
    assert cost["tokens"] == 4 * 32 * (1 + 10) + 2 * 64
    assert cost["memory_bytes"] > 7e8
    assert "10 measurements" in run("--formats", "fp8,int8", "--dry-run").stdout


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--formats", "fp8"], "where to?"),
        (["--formats", "fp8", "--dry-run", "--out", "s"], "--dry-run writes nothing"),
        (["--formats", "int4_awq", "--dry-run"], "int4_awq: the input width 64"),
        (["--out", "s"], "formats"),
    ],
)
def test_what_cannot_be_done_is_said_with_exit_code_2(run, arguments, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.exit_code == 2
    assert what in done.output
    assert "Traceback" not in done.output
