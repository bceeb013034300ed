"""A restored model is the calibrated one, bit for bit."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trt_kd.artifacts import Artifact, writing
from trt_kd.checkpoints import load_model
from trt_kd.config import StageConfig
from trt_kd.errors import ArtifactError, ModelError
from trt_kd.exporters.comparison import logits_of
from trt_kd.quantization.calibration import calibrate, quantizers
from trt_kd.quantization.storage import QUANTIZERS, format_of, load_quantized, save_quantized


class Made(StageConfig):
    stage = "quantize"
    format: dict


@pytest.fixture
def store(teacher, calibrated, blocks, tmp_path):
    """Calibrate the teacher; return the model and the artifact it was stored in."""
    model = load_model(teacher.path)
    kept = calibrate(model, calibrated, blocks)
    out = tmp_path / "quantized"
    config = Made(format=calibrated.model_dump())
    with writing(out, kind="quantized", config=config, inputs={"source": teacher}) as draft:
        save_quantized(model, teacher, draft.path, kept)
    return model, Artifact.open(out)


def test_a_restored_model_has_the_same_logits_bit_for_bit(store, blocks):
    model, artifact = store
    restored = load_quantized(artifact.path)
    for expected, actual in zip(logits_of(model, blocks), logits_of(restored, blocks), strict=True):
        assert (expected == actual).all()


def test_a_restored_model_has_the_same_tensors(store):
    model, artifact = store
    restored = load_quantized(artifact.path).state_dict()
    expected = model.state_dict()
    assert restored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, restored[name]), name


def test_a_restored_model_has_the_same_quantizers(store):
    model, artifact = store
    restored = dict(quantizers(load_quantized(artifact.path)))
    for name, quantizer in quantizers(model):
        if not quantizer.is_enabled:
            continue
        other = restored[name]
        assert type(other) is type(quantizer)
        state, found = quantizer.get_modelopt_state(), other.get_modelopt_state()
        for ignored in ("_input_dtype", "_pytorch_state_metadata"):
            state.pop(ignored, None)
            found.pop(ignored, None)
        assert str(state) == str(found), name


def test_the_artifact_is_still_the_source_for_a_stock_reader(store, teacher):
    _, artifact = store
    for name in teacher.manifest.files:
        assert (artifact.path / name).read_bytes() == (teacher.path / name).read_bytes()


def test_the_format_is_known_from_the_manifest(store, calibrated):
    assert format_of(store[1]) == calibrated


def test_float32_restores_the_same_arithmetic(store, blocks):
    restored = load_quantized(store[1].path, dtype="float32")
    assert {p.dtype for p in restored.parameters()} == {torch.float32}


def test_a_checkpoint_is_no_quantized_model(teacher):
    with pytest.raises(ArtifactError, match="not a quantized"):
        load_quantized(teacher.path)


def test_state_of_another_model_is_refused(store):
    _, artifact = store
    path = artifact.path / QUANTIZERS
    state = load_file(path)
    name = next(name for name in state if name.endswith("_amax"))
    with safe_open(path, framework="pt") as file:
        told = file.metadata()
    save_file({name.replace("layers.0", "layers.77"): state[name]}, path, told)
    with pytest.raises(ModelError, match=r"layers.77"):
        load_quantized(artifact.path)


def test_a_truncated_state_is_refused(store):
    path = store[1].path / QUANTIZERS
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ModelError, match="truncated"):
        load_quantized(store[1].path)


def test_a_state_of_an_earlier_layout_is_refused(store):
    path = store[1].path / QUANTIZERS
    save_file(load_file(path), path, {"static_block_scale": "[]"})
    with pytest.raises(ModelError, match="state"):
        load_quantized(store[1].path)
