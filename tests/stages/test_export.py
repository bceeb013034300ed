"""The export stage on the tiny teacher."""

import json

import pytest

from trt_kd.artifacts import Artifact, writing
from trt_kd.backends.base import backend_for
from trt_kd.config import StageConfig
from trt_kd.errors import ArtifactError, ModelError, VerificationError
from trt_kd.stages.export import ExportConfig, export
from trt_kd.stages.quantize import QuantizeConfig, quantize


@pytest.fixture(scope="module")
def quantized(teacher, data, tmp_path_factory) -> Artifact:
    config = QuantizeConfig(format="fp8", data=data, calibration_tokens=128, heldout_blocks=1)
    return quantize(config, source=teacher, out=tmp_path_factory.mktemp("stage") / "fp8")


def config_of(data, lane) -> ExportConfig:
    return ExportConfig.model_validate({"lane": lane, "data": data, "verify_blocks": 2})


def test_a_checkpoint_is_copied(teacher, data, tmp_path):
    artifact = export(config_of(data, "hf-unified"), source=teacher, out=tmp_path / "e")
    artifact.verify()
    assert artifact.manifest.kind == "export"
    assert artifact.manifest.config["lane"] == {"kind": "hf-unified"}
    metrics = artifact.metrics
    assert metrics["logits_kl_nats"] < metrics["logits_kl_limit_nats"]
    assert metrics["top1_agreement"] == 1.0
    assert metrics["verified_tokens"] == 64
    assert metrics["weight_bytes"] == (tmp_path / "e/model.safetensors").stat().st_size
    assert metrics["seconds"] > 0


def test_a_quantized_model_is_exported_smaller_and_read_back(teacher, quantized, data, tmp_path):
    artifact = export(config_of(data, "hf-unified"), source=quantized, out=tmp_path / "e")
    assert artifact.metrics["quant_algo"] == "FP8"
    assert 0 < artifact.metrics["logits_kl_nats"] < artifact.metrics["logits_kl_limit_nats"]
    assert artifact.metrics["weight_bytes"] < (teacher.path / "model.safetensors").stat().st_size
    assert set(artifact.manifest.lineage) >= {teacher.key, quantized.key}
    with backend_for(artifact).load(artifact.path) as session:
        assert session.vocab_size == 512


def test_a_stock_reader_needs_nothing_of_ours(teacher, data, tmp_path):
    from trt_kd.checkpoints import load_model

    artifact = export(config_of(data, "hf-unified"), source=teacher, out=tmp_path / "e")
    assert load_model(artifact.path).num_parameters() == load_model(teacher.path).num_parameters()


@pytest.mark.slow
def test_onnx_runtime_gets_its_own_format(teacher, data, forks, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime_genai")
    monkeypatch.setattr("trt_kd.exporters.ort_genai.subprocess", forks)
    lane = {"kind": "ort-genai", "precision": "int4"}
    artifact = export(config_of(data, lane), source=teacher, out=tmp_path / "e")
    artifact.verify()
    assert artifact.manifest.config["lane"]["precision"] == "int4"
    assert artifact.metrics["realised_low_bit_share"] > 0.9
    with backend_for(artifact).load(artifact.path) as session:
        assert session.vocab_size == 512


def test_a_quantized_model_does_not_go_to_onnx_runtime_genai(quantized, data, tmp_path):
    with pytest.raises(ModelError, match="plain checkpoint"):
        export(config_of(data, "ort-genai"), source=quantized, out=tmp_path / "e")
    assert not list(tmp_path.iterdir())


def test_an_export_is_not_exported_again(teacher, data, tmp_path):
    first = export(config_of(data, "hf-unified"), source=teacher, out=tmp_path / "e")
    with pytest.raises(ArtifactError, match="holds a export"):
        export(config_of(data, "hf-unified"), source=first, out=tmp_path / "f")


def test_a_bad_export_leaves_nothing_behind(quantized, data, tmp_path, monkeypatch):
    from trt_kd.exporters.hf_unified import HfUnified

    good = HfUnified.export

    def other_rotation(self, source, out):
        metrics = good(self, source, out)
        path = out / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 5e5}))
        return metrics

    monkeypatch.setattr(HfUnified, "export", other_rotation)
    with pytest.raises(VerificationError, match=r"rope_theta is 500000\.0"):
        export(config_of(data, "hf-unified"), source=quantized, out=tmp_path / "e")
    assert not list(tmp_path.iterdir())


def test_an_export_beyond_its_limit_leaves_nothing_behind(quantized, data, tmp_path, monkeypatch):
    from trt_kd.exporters.hf_unified import HfUnified

    monkeypatch.setattr(HfUnified, "kl_limit_nats", lambda *_: -1.0)
    with pytest.raises(VerificationError, match=r"strays from its source: mean KL .* nats"):
        export(config_of(data, "hf-unified"), source=quantized, out=tmp_path / "e")
    assert not list(tmp_path.iterdir())


def test_a_rehearsal_compares_one_block(data):
    assert config_of(data, "hf-unified").rehearsal().verify_blocks == 1
    assert config_of(data, "hf-unified").outside().keys() == {"data"}


def test_what_was_exported_is_told_by_the_manifest_of_the_source_kind(data, tmp_path, teacher):
    class Reported(StageConfig):
        stage = "report"

    with writing(tmp_path / "r", kind="report", config=Reported(), inputs={}) as draft:
        (draft.path / "report.md").write_text("-")
    with pytest.raises(ArtifactError, match="holds a report"):
        export(
            config_of(data, "hf-unified"), source=Artifact.open(tmp_path / "r"), out=tmp_path / "e"
        )
