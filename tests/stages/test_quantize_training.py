"""Training in quantizers: it pays, it resumes bit for bit, and what it leaves is as any other."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from trt_kd.architectures.shape import read_shape
from trt_kd.artifacts import work_directory
from trt_kd.checkpoints import load_model
from trt_kd.config import build_plugin, validate
from trt_kd.errors import ConfigError, TrtKdError
from trt_kd.exporters.comparison import compare, logits_of
from trt_kd.exporters.hf_unified import HfUnified
from trt_kd.exporters.trtllm_checkpoint import TrtllmCheckpoint
from trt_kd.exporters.verification import source_logits, verify
from trt_kd.quantization import FORMATS
from trt_kd.quantization.calibration import calibrate, quantizers
from trt_kd.quantization.storage import QUANTIZERS, load_quantized
from trt_kd.quantization.training import refit_weights, stock_weights
from trt_kd.stages.quantize import QuantizeConfig, quantize

AWQ = {"kind": "int4_awq", "block_size": 64}
MIXED = {"kind": "mixed", "formats": ["int8", AWQ], "effective_bits": 5.0, "score_tokens": 32}
FORMS = ["fp8", "int8", "int8_smoothquant", AWQ, MIXED]


def _named(form):
    return form if isinstance(form, str) else form["kind"]


@pytest.fixture(scope="module")
def source(make_student):
    """The checkpoint that everything here starts from; never write into it."""
    return make_student(noise=0.0, num_hidden_layers=4, intermediate_size=64)


@pytest.fixture
def settings(text_file):
    """Settings of a short training in INT4; tests change what they are about."""
    return _settings(text_file)


def _settings(text_file):
    data = {"source": {"kind": "text", "files": [str(text_file)]}, "block_tokens": 32}
    train = {"steps": 30, "batch_size": 4, "learning_rate": 1e-4, "precision": "fp32"}
    return {
        "format": AWQ,
        "data": data,
        "calibration_tokens": 256,
        "heldout_blocks": 4,
        "train": train | {"data": data, "checkpoint_every_steps": 5, "monitor": None},
    }


def config_of(settings, form=AWQ, **train) -> QuantizeConfig:
    given = settings | {"format": form, "train": settings["train"] | train}
    return validate(QuantizeConfig, given, where="quantize")


@pytest.fixture(scope="module")
def blocks():
    return np.random.default_rng(0).integers(1, 500, (2, 32))


@pytest.fixture(scope="module")
def calibrated(source, blocks):
    """Calibrate the source in float32 in a format."""

    def make(form):
        model = load_model(source.path, dtype="float32")
        calibrate(model, build_plugin(FORMATS, form), blocks)
        return model

    return make


@pytest.fixture(scope="module")
def trained(source, text_file, tmp_path_factory):
    """Trained artifacts by format, each made when first asked for; do not write into them."""
    made = {}

    def make(form):
        if _named(form) not in made:
            out = tmp_path_factory.mktemp("trained") / "q"
            config = config_of(_settings(text_file), form)
            made[_named(form)] = quantize(config, source=source, out=out)
        return made[_named(form)]

    return make


@pytest.mark.parametrize("form", ["fp8", "int8_smoothquant", AWQ, MIXED], ids=_named)
def test_distillation_brings_the_model_nearer_to_what_it_was(trained, form):
    """The law: after training, held-out KL to the unquantized model is below that of PTQ."""
    made = trained(form)
    before = made.metrics["kl_to_source_before_training_nats"]
    assert 0 < made.metrics["kl_to_source_nats"] < 0.95 * before
    assert made.metrics["training"]["steps"] == 30
    assert not work_directory(made.path).exists()


@pytest.mark.parametrize("form", ["fp8", "int8", "int8_smoothquant", AWQ], ids=_named)
def test_scales_of_weights_that_did_not_change_are_those_of_calibration(calibrated, form):
    model = calibrated(form)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "_amax" in name}
    refit_weights(model)
    after = dict(model.named_buffers())
    assert any("weight_quantizer" in name for name in before)
    for name, amax in before.items():
        assert torch.equal(after[name], amax), name


@pytest.mark.parametrize("form", ["fp8", AWQ], ids=_named)
def test_scales_follow_the_weights_and_those_of_activations_stay(calibrated, form):
    model = calibrated(form)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "_amax" in name}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.mul_(2)
    refit_weights(model)
    for name, buffer in model.named_buffers():
        if "_amax" in name:
            factor = 2 if "weight_quantizer" in name else 1
            torch.testing.assert_close(buffer, factor * before[name])


@pytest.mark.parametrize("form", ["int8_smoothquant", AWQ], ids=_named)
def test_without_the_smoothing_the_weights_are_the_stock_model_s(calibrated, source, form):
    model = calibrated(form)
    stock = load_model(source.path, dtype="float32")
    found = stock_weights(model)
    own = dict(model.named_parameters())
    assert found.keys() == own.keys()
    for name, weight in stock.named_parameters():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-7)
    assert any(not torch.allclose(own[name], found[name]) for name in own)


@pytest.mark.parametrize("form", ["int8_smoothquant", AWQ], ids=_named)
def test_what_is_stored_is_what_was_measured_and_a_stock_checkpoint_beside_it(
    trained, source, settings, form
):
    from trt_kd.stages.quantize import _blocks

    made = trained(form)
    _, heldout = _blocks(config_of(settings, form), source)
    reference = list(logits_of(load_model(source.path), heldout))
    kl = compare(reference, logits_of(load_quantized(made.path), heldout)).kl_nats
    assert kl == pytest.approx(made.metrics["kl_to_source_nats"], rel=1e-6)
    stock = load_model(made.path)  # no key too many, none missing
    assert read_shape(made.path) == read_shape(source.path)
    assert 0 < compare(reference, logits_of(stock, heldout)).kl_nats < kl
    made.verify()
    assert not [path for path in made.path.rglob("*") if path.suffix in (".pth", ".pt", ".bin")]


@pytest.mark.parametrize("form", ["fp8", "int8_smoothquant", AWQ, MIXED], ids=_named)
def test_a_trained_model_ships_like_any_other(trained, blocks, tmp_path, form):
    made = trained(form)
    reference = source_logits(made, blocks)
    lanes = [HfUnified(), TrtllmCheckpoint(dtype="bfloat16")][: 1 if form is MIXED else 2]
    for lane in lanes:
        out = tmp_path / lane.kind
        out.mkdir()
        lane.export(made, out)
        verify(lane, made, out, blocks, reference)


def test_a_run_that_was_cut_off_ends_as_an_unbroken_one(
    trained, source, settings, tmp_path, monkeypatch
):
    """Bit for bit, and neither calibrated nor trained anew up to there."""
    whole, config, out = trained(AWQ), config_of(settings), tmp_path / "q"
    with monkeypatch.context() as patch:
        patch.setattr("trt_kd.training.callbacks.Progress.on_log", _cut_off)
        with pytest.raises(KeyboardInterrupt):
            quantize(config, source=source, out=out)
    work = work_directory(out)
    assert [path.name for path in (work / "checkpoints").iterdir()] == ["checkpoint-15"]
    assert not list(work.rglob("modelopt_state*"))
    with monkeypatch.context() as patch:
        patch.setattr("trt_kd.quantization.calibration.calibrate", None)
        made = quantize(config, source=source, out=out)
    assert made.key == whole.key
    weights = [name for name in whole.manifest.files if name.endswith(".safetensors")]
    assert QUANTIZERS in weights
    assert len(weights) == 2
    for name in weights:
        assert made.manifest.files[name] == whole.manifest.files[name]
    assert made.metrics["training"]["steps"] == 30


def _cut_off(self, args, state, control, logs=None, **_):
    if state.global_step == 18:
        raise KeyboardInterrupt


def test_labels_alone_train_without_a_teacher(source, settings, tmp_path):
    plain = {"task_weight": 1.0, "response_weight": 0.0, "steps": 2}
    monitor = {"every_steps": 1, "blocks": 1, "skip_blocks": 4}
    made = quantize(
        config_of(settings, "fp8", **plain, monitor=monitor), source=source, out=tmp_path / "q"
    )
    training = made.metrics["training"]
    assert "task_nats_per_token" in training
    assert "response_nats_per_token" not in training
    assert {"history.jsonl", "monitors.jsonl"} <= made.manifest.files.keys()


def test_a_cache_that_is_calibrated_trains_along(source, settings, tmp_path):
    form = {"kind": "fp8", "kv_cache": "fp8"}
    made = quantize(config_of(settings, form, steps=2), source=source, out=tmp_path / "q")
    enabled = [name for name, q in quantizers(load_quantized(made.path)) if q.is_enabled]
    assert sum(name.endswith("_bmm_quantizer") for name in enabled) == 2 * 4


@pytest.mark.parametrize(
    ("form", "train", "reason"),
    [
        ("w4a8_awq", {}, "scales of w4a8_awq cannot follow"),
        ({"kind": "recipe", "name": "fp8_default-kv_fp8"}, {}, "scales of recipe cannot follow"),
        ("fp8", {"features": [{"loss": "mse"}]}, "features has no place"),
        ("fp8", {"on_policy": {"share": 0.5}}, "on_policy"),
        ("fp8", {"exits": {"layers": [0]}}, "exits has no place"),
        ("fp8", {"balance": {}, "task_weight": 0.5}, "balance has no place"),
        ("fp8", {"allow_smaller_teacher": True}, "allow_smaller_teacher has no effect"),
        ("fp8", {"sharding": "fsdp2"}, "sharding fsdp2 does not take quantizers"),
        (
            "fp8",
            {"teacher": {"kind": "several", "others": ["t"]}},
            "teacher is the model before quantization",
        ),
    ],
)
def test_settings_without_effect_are_refused(settings, form, train, reason):
    with pytest.raises(ConfigError, match=reason):
        config_of(settings, form, **train)


def test_a_loss_that_is_not_finite_keeps_the_calibration(source, settings, tmp_path):
    config = config_of(settings, "fp8", learning_rate=1e30, checkpoint_every_steps=1)
    with pytest.raises(TrtKdError, match="diverged at step"):
        quantize(config, source=source, out=tmp_path / "q")
    assert not (tmp_path / "q").exists()
    assert (work_directory(tmp_path / "q") / "calibrated" / QUANTIZERS).is_file()


def test_training_reads_the_text_of_the_quantization_unless_told_otherwise(settings):
    given = {name: value for name, value in settings["train"].items() if name != "data"}
    config = validate(QuantizeConfig, settings | {"train": given, "seed": 7}, where="quantize")
    assert config.train.data == config.data
    assert config.train.seed == 7
    assert config_of(settings, seed=3).train.seed == 3


def test_experts_are_refused_from_the_sizes_alone(settings, source):
    shape = replace(read_shape(source.path), experts=4)
    assert any("experts are not trained" in problem for problem in config_of(settings).check(shape))


def test_a_rehearsal_trains_for_two_steps(settings):
    config = config_of(settings).rehearsal()
    assert (config.train.steps, config.train.batch_size) == (2, 1)
    assert config.outside().keys() == {"data", "train.data"}
