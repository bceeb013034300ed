"""What every quantization format says without torch, and what its model says with it."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from trt_kd.architectures.shape import ModelShape
from trt_kd.config import build_plugin, validate
from trt_kd.errors import ConfigError
from trt_kd.quantization import FORMATS
from trt_kd.quantization.base import QuantizationFormat
from trt_kd.stages.quantize import QuantizeConfig

SHAPE = ModelShape("llama", 4, 1024, 2048, 8, 4, 128, 512, tied=True)


REQUIRED = {"recipe": {"kind": "recipe", "name": "general/ptq/fp8_default-kv_fp8"}}
"""Settings of formats that have no defaults."""


@pytest.fixture(params=FORMATS.names())
def quantization(request) -> QuantizationFormat:
    return build_plugin(FORMATS, REQUIRED.get(request.param, request.param))


def test_a_format_is_named_as_registered(quantization):
    assert FORMATS.load(quantization.kind) is type(quantization)


def test_a_format_survives_its_own_settings(quantization):
    assert build_plugin(FORMATS, quantization.model_dump()) == quantization


def test_a_format_brings_a_model_optimizer_configuration_of_its_own(quantization):
    config = quantization.modelopt_config()
    assert {"quant_cfg", "algorithm"} <= set(config)
    config["quant_cfg"].clear()
    assert quantization.modelopt_config()["quant_cfg"]


def test_a_width_that_no_kernel_takes_is_named(quantization):
    odd = dataclasses.replace(SHAPE, ffn=2043)
    assert any("2043 of down_proj" in problem for problem in quantization.check(odd))


@pytest.mark.parametrize("name", ["fp8", "int8", "int8_smoothquant", "int4_awq"])
def test_an_nvfp4_cache_is_refused_with_the_reason(name):
    with pytest.raises(ConfigError, match=r"CUDA kernels only.*choose fp8"):
        validate(QuantizeConfig, {"format": {"kind": name, "kv_cache": "nvfp4"}}, where="quantize")


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        (REQUIRED["recipe"] | {"kv_cache": "fp8"}, "a recipe says itself what the cache is"),
        ({"kind": "mixed", "formats": [{"kind": "fp8", "kv_cache": "fp8"}]}, "of mixed itself"),
    ],
)
def test_a_cache_is_told_in_one_place(settings, what):
    with pytest.raises(ConfigError, match=what):
        validate(QuantizeConfig, {"format": settings}, where="quantize")


@pytest.mark.parametrize("name", sorted({*FORMATS.names()} - {"recipe", "nvfp4"}))
def test_widths_that_every_kernel_takes_are_fine(name):
    assert build_plugin(FORMATS, name).check(SHAPE) == []


def test_blocks_of_fp8_must_divide_output_widths_too():
    narrow = dataclasses.replace(SHAPE, kv_heads=1, head_dim=64, heads=16)
    (problem,) = build_plugin(FORMATS, "fp8_block").check(narrow)
    assert "the output width 64 of k_proj, v_proj is no multiple of 128" in problem


def test_the_width_of_experts_is_checked_too():
    moe = dataclasses.replace(SHAPE, experts=4, expert_ffn=96)
    (problem,) = build_plugin(FORMATS, "int4_awq").check(moe)
    assert "the input width 96 of the experts' down_proj is no multiple of 128" in problem


def test_the_block_size_of_int4_must_divide_every_input_width():
    smollm = ModelShape("llama", 30, 576, 1536, 9, 3, 64, 49152, tied=True)
    awq = FORMATS.load("int4_awq")
    assert len(awq().check(smollm)) == 2
    assert awq(block_size=64).check(smollm) == []
    entries = awq(block_size=64).modelopt_config()["quant_cfg"]
    blocks = [e["cfg"]["block_sizes"] for e in entries if (e.get("cfg") or {}).get("block_sizes")]
    assert [block[-1] for block in blocks] == [64]


@pytest.mark.parametrize(("gpu", "count"), [(None, 1), ("1 x NVIDIA H100", 0)])
def test_nvfp4_is_refused_where_there_is_no_gpu(monkeypatch, gpu, count):
    monkeypatch.setattr("trt_kd.quantization.nvfp4.environment", lambda: {"gpu": gpu})
    problems = FORMATS.load("nvfp4")().check(SHAPE)
    assert sum("CUDA" in problem for problem in problems) == count == len(problems)


def test_the_share_of_smoothing_reaches_model_optimizer():
    config = FORMATS.load("int8_smoothquant")(alpha=0.25).modelopt_config()
    assert config["algorithm"] == {"method": "smoothquant", "alpha": 0.25}


def test_formats_and_their_checks_need_no_torch():
    code = (
        "import sys; from trt_kd.quantization import FORMATS\n"
        "from trt_kd.architectures.shape import ModelShape\n"
        "shape = ModelShape('llama', 1, 64, 64, 1, 1, 64, 64, tied=True)\n"
        "from trt_kd.config import build_plugin\n"
        f"required = {REQUIRED}\n"
        "for name in FORMATS.names():\n"
        "    build_plugin(FORMATS, required.get(name, name)).check(shape)\n"
        "sys.exit(bool({'torch', 'modelopt'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_page_says_of_every_format_what_it_is():
    page = (Path(__file__).parents[2] / "docs/quantization.md").read_text(encoding="utf-8")
    assert [name for name in FORMATS.names() if f"`{name}`" not in page] == []
