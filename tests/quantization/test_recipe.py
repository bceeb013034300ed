"""Recipes that Model Optimizer ships, and own files: read, refused, kept in full."""

import dataclasses

import pytest
import yaml

from trt_kd.architectures.shape import ModelShape
from trt_kd.checkpoints import load_model
from trt_kd.config import build_plugin, validate
from trt_kd.errors import ConfigError
from trt_kd.exporters.comparison import logits_of
from trt_kd.quantization import FORMATS
from trt_kd.quantization.calibration import calibrate
from trt_kd.quantization.modelopt import modelopt
from trt_kd.quantization.recipe_files import library, names, shipped
from trt_kd.quantization.storage import load_quantized
from trt_kd.stages.quantize import QuantizeConfig, quantize

SHAPE = ModelShape("llama", 4, 1024, 2048, 8, 4, 128, 512, tied=True)
FP8_CACHE = "fp8_default-kv_fp8"
OWN = """
metadata: {recipe_type: ptq, description: FP8 weights only in the MLP}
quantize:
  algorithm: max
  quant_cfg:
    - {quantizer_name: "*", enable: false}
    - {quantizer_name: "*mlp*weight_quantizer", cfg: {num_bits: e4m3, axis: null}}
"""


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr("trt_kd.quantization.recipe.environment", lambda: {"gpu": None})


def recipe(**settings):
    return build_plugin(FORMATS, {"kind": "recipe", **settings})


def test_every_shipped_recipe_is_taken_or_refused_for_its_reason():
    """Those that Model Optimizer loads and that hold no four-bit float are taken."""
    assert len(names()) > 10
    for name in names():
        problems = recipe(name=name).check(SHAPE)
        four_bit_floats = "nvfp4" in name or "mxfp4" in name
        assert bool(problems) == four_bit_floats, (name, problems)
        assert all("needs a CUDA GPU" in problem for problem in problems)


def test_with_a_gpu_nothing_is_refused(monkeypatch):
    monkeypatch.setattr("trt_kd.quantization.recipe.environment", lambda: {"gpu": "1 x H100"})
    assert [name for name in names() if recipe(name=name).check(SHAPE)] == []


def test_a_recipe_says_what_model_optimizer_reads_in_it():
    modelopt("quantization")
    from modelopt.recipe import load_recipe
    from modelopt.torch.quantization.config import QuantizeConfig as Settings

    for name in (FP8_CACHE, "int4_blockwise_weight_only"):
        plugin = recipe(name=name)
        expected = load_recipe(f"general/ptq/{name}").quantize
        assert Settings(**plugin.modelopt_config()) == expected
        kept = plugin.restored_config(plugin.kept())
        assert Settings(**kept).quant_cfg == expected.quant_cfg
        assert kept["algorithm"] is None


def test_a_name_may_be_a_path_below_the_library_or_a_configuration():
    assert shipped(FP8_CACHE) == shipped(f"general/ptq/{FP8_CACHE}.yaml")
    assert recipe(name="FP8_DEFAULT_CFG").modelopt_config()["algorithm"] == "max"
    assert recipe(name="FP8_DEFAULT_CFG").check(SHAPE) == []
    assert "CUDA" in recipe(name="MXFP8_DEFAULT_CFG").check(SHAPE)[0]
    with pytest.raises(ConfigError, match="has no configuration FP7_CFG"):
        recipe(name="FP7_CFG").modelopt_config()


def test_blocks_must_divide_every_input_width():
    narrow = dataclasses.replace(SHAPE, hidden=576)
    assert any(
        "576" in problem and "no multiple of 128" in problem
        for problem in recipe(name="int4_blockwise_weight_only").check(narrow)
    )


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("metadata: {recipe_type: auto_quantize}\nauto_quantize: {}", "kind: mixed"),
        ("metadata: {recipe_type: speculative_eagle}\neagle: {}", "not ptq"),
        ("quantize: {}", "of type None"),
        ("a: [", "cannot be read"),
        ("imports: {x: ../../../etc/passwd}\nmetadata: {recipe_type: ptq}", "ships no recipe"),
    ],
)
def test_what_is_no_recipe_for_quantization_is_refused(tmp_path, text, what):
    path = tmp_path / "own.yaml"
    path.write_text(text, encoding="utf-8")
    (problem,) = recipe(file=path).check(SHAPE)
    assert what in problem


def test_an_unknown_name_is_answered_with_the_names_there_are():
    (problem,) = recipe(name="fp9").check(SHAPE)
    assert FP8_CACHE in problem
    assert recipe(name="../../modelopt/version").check(SHAPE)[0].startswith("Model Optimizer ships")


@pytest.mark.parametrize("settings", [{}, {"name": "a", "file": "b"}])
def test_a_recipe_has_a_name_or_a_file(settings):
    with pytest.raises(ConfigError, match="either name or file"):
        validate(QuantizeConfig, {"format": {"kind": "recipe", **settings}}, where="quantize")


def test_a_changed_file_is_other_work(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(OWN, encoding="utf-8")
    before = recipe(file=path).outside()
    assert before == recipe(file=path).outside()
    path.write_text(OWN.replace("max", "mse"), encoding="utf-8")
    assert recipe(file=path).outside() != before


def test_an_own_recipe_quantizes_and_is_restored_without_its_file(
    teacher, text_file, tmp_path, blocks
):
    path = tmp_path / "own.yaml"
    path.write_text(OWN, encoding="utf-8")
    settings = {
        "format": {"kind": "recipe", "file": str(path)},
        "data": {"source": {"kind": "text", "files": [str(text_file)]}, "block_tokens": 32},
        "calibration_tokens": 64,
        "heldout_blocks": 1,
    }
    config = validate(QuantizeConfig, settings, where="quantize")
    made = quantize(config, source=teacher, out=tmp_path / "q")
    assert made.metrics["kl_to_source_nats"] > 0
    path.unlink()
    model = load_model(teacher.path)
    path.write_text(OWN, encoding="utf-8")
    calibrate(model, recipe(file=path), blocks)
    path.unlink()
    for expected, found in zip(
        logits_of(model, blocks), logits_of(load_quantized(made.path), blocks), strict=True
    ):
        assert (expected == found).all()  # weights only: the text does not matter


def test_the_library_is_found_without_loading_it():
    root = library()
    assert root is not None
    assert yaml.safe_load((root / "general/ptq/fp8_default-kv_fp8.yaml").read_text())["metadata"]
