"""ONNX Runtime GenAI for GPUs: what is written for them, read back on a CPU."""

import json
import shutil

import numpy as np
import pytest

from trt_kd.backends.ort_genai import OrtGenai as Backend
from trt_kd.config import validate
from trt_kd.errors import ConfigError, ModelError, VerificationError
from trt_kd.exporters.ort_genai import OrtGenai
from trt_kd.exporters.verification import source_logits, verify

WRITTEN = {
    ("cuda", "fp16"): 1e-4,
    ("cuda", "bf16"): 0.01,
    ("cuda", "int8"): 0.05,
    ("cuda", "int4"): 0.5,
    ("trt-rtx", "fp16"): 1e-4,
    ("trt-rtx", "bf16"): 0.01,
}
"""Largest KL of the tiny teacher's export, by provider and precision."""


@pytest.fixture(scope="module")
def exported(teacher, forks, tmp_path_factory):
    """Lane, metrics and folder by provider and precision, each made when first asked for."""
    pytest.importorskip("onnxruntime_genai")
    made = {}

    def make(provider, precision):
        if (provider, precision) not in made:
            out = tmp_path_factory.mktemp("providers") / f"{provider}-{precision}"
            out.mkdir()
            lane = OrtGenai(provider=provider, precision=precision)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("trt_kd.exporters.ort_genai.subprocess", forks)
                made[provider, precision] = lane, lane.export(teacher, out), out
        return made[provider, precision]

    return make


@pytest.fixture(scope="module")
def reference(teacher, blocks):
    return source_logits(teacher, blocks)


@pytest.mark.slow
@pytest.mark.parametrize("what", WRITTEN, ids=" ".join)
def test_a_graph_for_a_gpu_agrees_with_its_source(exported, teacher, blocks, reference, what):
    lane, told, out = exported(*what)
    difference = verify(lane, teacher, out, blocks, reference)
    assert difference.kl_nats < WRITTEN[what]
    if what[1] in ("fp16", "bf16"):
        assert told["weight_share_by_bits"] == {"16": 1.0}
    else:
        assert told["realised_low_bit_share"] > 0.7


@pytest.mark.slow
def test_a_graph_for_a_gpu_is_loaded_elsewhere_only_when_asked_for(exported, monkeypatch):
    _, _, out = exported("cuda", "fp16")
    with pytest.raises(ModelError) as caught:
        Backend().load(out)
    assert "where the provider is" in caught.value.hint
    with Backend(provider="cpu").load(out) as session:
        assert session.logits(np.ones((1, 3), dtype=np.int64)).shape == (1, 3, 512)


def test_an_export_for_a_gpu_runs_where_one_is(monkeypatch):
    for gpu, runs in ((None, False), ("1 x NVIDIA L4", True)):
        monkeypatch.setattr("trt_kd.exporters.ort_genai.environment", lambda gpu=gpu: {"gpu": gpu})
        assert OrtGenai(provider="cuda", precision="fp16").executed is runs
        assert OrtGenai().executed


@pytest.mark.parametrize(
    ("settings", "known"),
    [
        ({"precision": "fp16"}, "provider cpu takes precision fp32, int8, int4"),
        ({"provider": "cuda", "precision": "fp32"}, "cuda takes precision fp16, bf16, int8, int4"),
        ({"provider": "trt-rtx"}, "trt-rtx takes precision fp16, bf16"),
    ],
)
def test_a_precision_that_a_provider_is_not_given_is_refused(settings, known):
    with pytest.raises(ConfigError, match=known):
        validate(OrtGenai, settings, where="lane")


def other_provider(out):
    path = out / "genai_config.json"
    path.write_text(path.read_text().replace('"NvTensorRtRtx"', '"cuda"'))


def other_epsilon(out):
    import onnx

    model = onnx.load(out / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "value" and attribute.t.data_type == onnx.TensorProto.FLOAT:
                values = onnx.numpy_helper.to_array(attribute.t)
                if values.size == 1 and 0 < values.item() < 1e-3:
                    new = onnx.numpy_helper.from_array(values * 100, attribute.t.name)
                    attribute.t.CopyFrom(new)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and np.prod(tensor.dims) == 1:
            values = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values * 100, tensor.name))
    onnx.save(model, out / "model.onnx")


def other_precision(out):
    path = out / "genai_config.json"
    settings = json.loads(path.read_text())
    settings["model"]["decoder"]["head_size"] = 8
    path.write_text(json.dumps(settings))


FAULTS = {"provider": other_provider, "epsilon": other_epsilon, "head size": other_precision}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen_in_the_files(exported, teacher, tmp_path, fault):
    lane, _, good = exported("trt-rtx", "fp16")
    out = tmp_path / "spoilt"
    shutil.copytree(good, out)
    assert lane.problems(teacher, out) == []
    FAULTS[fault](out)
    assert lane.problems(teacher, out) != []


@pytest.mark.slow
def test_the_weights_of_a_widened_graph_are_checked_too(
    exported, teacher, blocks, reference, tmp_path
):
    lane, _, good = exported("trt-rtx", "bf16")
    out = tmp_path / "spoilt"
    shutil.copytree(good, out)
    path = out / "model.onnx.data"
    data = np.frombuffer(path.read_bytes(), dtype=np.uint8).copy()
    data[len(data) // 2 :] ^= 0x11
    path.write_bytes(data.tobytes())
    with pytest.raises(VerificationError):
        verify(lane, teacher, out, blocks, reference)
