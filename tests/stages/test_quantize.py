"""The quantize stage on the tiny teacher."""

import pytest

from trt_kd.artifacts import Artifact
from trt_kd.config import validate
from trt_kd.errors import ArtifactError, ConfigError, ModelError
from trt_kd.quantization.storage import load_quantized
from trt_kd.stages.quantize import QuantizeConfig, quantize


@pytest.fixture
def settings(text_file):
    return {
        "format": "fp8",
        "data": {"source": {"kind": "text", "files": [str(text_file)]}, "block_tokens": 32},
        "calibration_tokens": 100,
        "heldout_blocks": 2,
    }


def config_of(settings, **changes) -> QuantizeConfig:
    return QuantizeConfig.model_validate(settings | changes)


@pytest.mark.parametrize("name", ["fp8", "int8_smoothquant", "int8"])
def test_a_checkpoint_becomes_a_quantized_artifact(teacher, settings, tmp_path, name):
    artifact = quantize(config_of(settings, format=name), source=teacher, out=tmp_path / "q")
    assert artifact.manifest.kind == "quantized"
    assert artifact.manifest.inputs == {"source": teacher.key}
    artifact.verify()
    metrics = artifact.metrics
    assert 0 < metrics["kl_to_source_nats"] < 0.5
    assert 0.5 < metrics["top1_agreement"] <= 1
    assert metrics["calibration_tokens"] == 128  # 100 rounded up to whole blocks of 32
    assert metrics["heldout_tokens"] == 64
    assert len(metrics["calibration_fingerprint"]) == 64
    assert metrics["seconds"] > 0
    assert load_quantized(artifact.path).config.vocab_size == 512


def test_the_same_work_gives_the_same_files(teacher, settings, tmp_path):
    config = config_of(settings)
    first = quantize(config, source=teacher, out=tmp_path / "a")
    second = quantize(config, source=teacher, out=tmp_path / "b")
    assert first.key == second.key
    assert first.manifest.files == second.manifest.files


def test_options_of_the_format_are_part_of_the_key_and_the_manifest(settings):
    plain = config_of(settings, format="int8_smoothquant")
    other = config_of(settings, format={"kind": "int8_smoothquant", "alpha": 0.25})
    assert plain != other
    assert other.model_dump()["format"] == {
        "kind": "int8_smoothquant",
        "kv_cache": "none",
        "alpha": 0.25,
    }
    assert QuantizeConfig.model_validate(other.model_dump()) == other


def test_a_format_that_does_not_fit_is_refused_before_any_work(teacher, settings, tmp_path):
    with pytest.raises(ModelError, match="64 of o_proj is no multiple of 128"):
        quantize(config_of(settings, format="int4_awq"), source=teacher, out=tmp_path / "q")
    assert not list(tmp_path.iterdir())


def test_a_rehearsal_is_short_and_passes_through_every_line(teacher, settings, tmp_path):
    config = config_of(settings, calibration_tokens=8192).rehearsal()
    assert (config.calibration_tokens, config.heldout_blocks) == (64, 1)
    assert quantize(config, source=teacher, out=tmp_path / "q").metrics["heldout_tokens"] == 32


def test_the_text_is_part_of_the_work(settings):
    assert config_of(settings).outside().keys() == {"data"}


def test_a_typo_is_named_with_its_path(settings):
    with pytest.raises(ConfigError, match=r"format: unknown quantization format 'fp7'"):
        validate(QuantizeConfig, settings | {"format": "fp7"}, where="quantize")


def test_a_finished_artifact_is_not_written_over(teacher, settings, tmp_path):
    (tmp_path / "q").mkdir()
    with pytest.raises(ArtifactError, match="exists already"):
        quantize(config_of(settings), source=teacher, out=tmp_path / "q")


def test_a_failure_leaves_nothing_behind(teacher, settings, tmp_path, monkeypatch):
    def fail(*_):
        raise ModelError("planted")

    monkeypatch.setattr("trt_kd.quantization.calibration.check_scales", fail)
    with pytest.raises(ModelError, match="planted"):
        quantize(config_of(settings), source=teacher, out=tmp_path / "q")
    assert not list(tmp_path.iterdir())


def test_the_source_is_left_as_it_was(teacher, settings, tmp_path):
    quantize(config_of(settings), source=teacher, out=tmp_path / "q")
    Artifact.open(teacher.path).verify()
