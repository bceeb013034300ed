"""Budgets and memory: closed forms against real models, real exports and layouts by hand."""

from dataclasses import replace

import pytest

from trt_kd.architectures.shape import ModelShape, shape_from_config
from trt_kd.config import validate
from trt_kd.errors import ConfigError, ModelError
from trt_kd.pruning.budget import MB, Budget, memory_bytes, memory_table
from trt_kd.pruning.catalogue import catalogue

TINY = ModelShape(
    model_type="llama",
    layers=2,
    hidden=256,
    ffn=512,
    heads=4,
    kv_heads=2,
    head_dim=64,
    vocab=512,
    tied=False,
)
QWEN3 = replace(TINY, model_type="qwen3", qk_norm="head")
MIXTURE = replace(
    TINY, layers=6, experts=8, experts_per_token=2, expert_ffn=96, dense_layers=2, ffn=320
)
WINDOWED = replace(TINY, layers=6, window=64, window_layers=5, norms_per_layer=4)
BIASED = replace(
    TINY, attention_bias=True, output_bias=True, mlp_bias=True, gated=False, norm_bias=True
)
SHAPES = [TINY, QWEN3, replace(TINY, tied=True), MIXTURE, WINDOWED, BIASED]
FORMATS = list(catalogue().formats)


def weights(shape: ModelShape, name: str) -> int:
    parts = memory_bytes(shape, weight_format=name)
    return sum(count for part, count in parts.items() if part != "kv_cache")


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_bytes_are_those_of_a_real_models_parameters(make_decoder, model_type, tied):
    import torch

    model = make_decoder(model_type, tie_word_embeddings=tied).to(torch.bfloat16)
    shape = shape_from_config(model.config.to_dict())
    real = sum(parameter.nbytes for parameter in model.parameters())
    assert weights(shape, "bf16") == real
    assert weights(shape, "fp32") == 2 * real


@pytest.mark.parametrize(
    ("name", "shape", "written"),
    [
        # tensor bytes of what Model Optimizer 0.47.0 exported for these shapes
        ("bf16", TINY, 2_886_144),
        ("fp8", TINY, 1_706_608),
        ("fp8", replace(TINY, tied=True), 1_444_464),
        ("nvfp4", TINY, 1_190_512),
        ("int8_smoothquant", TINY, 1_731_128),
    ],
)
def test_weight_bytes_are_those_of_a_real_export(name, shape, written):
    assert weights(shape, name) == written


@pytest.mark.parametrize(("name", "written"), [("int4_awq", 1_156_608), ("w4a8", 1_156_720)])
def test_int4_differs_from_the_export_by_group_scales_in_16_bits(name, written):
    groups = 36_864 // 4  # the export holds them in float32
    assert weights(TINY, name) == written - 2 * groups


def test_a_quantized_layout_counted_by_hand():
    shape = replace(TINY, layers=1, hidden=64, ffn=160, heads=2, kv_heads=1, head_dim=32, vocab=10)
    matrices = [(64, 64), (32, 64), (32, 64), (64, 64), (160, 64), (160, 64), (64, 160)]
    packed = sum(rows * columns // 2 for rows, columns in matrices)
    scales = sum(rows * (columns // 16) for rows, columns in matrices)
    scalars = len(matrices) * 2 * 4
    rest = 2 * (2 * 10 * 64 + 3 * 64)
    assert weights(shape, "nvfp4") == packed + scales + scalars + rest
    blocks = sum(rows * columns // 32 for rows, columns in matrices)
    assert weights(shape, "mxfp4") == packed + blocks + rest
    head = 10 * 64 // 2 + 4 * 10 * 2
    assert weights(shape, "int4_block32") == packed + 4 * blocks + head + 4 * (10 * 64 + 3 * 64)
    tied = replace(shape, tied=True)
    assert weights(tied, "int4_block32") == packed + 4 * blocks + head + 4 * 3 * 64


def test_a_partial_block_costs_a_whole_one():
    whole, partial = (weights(replace(TINY, ffn=ffn), "int4_block32") for ffn in (512, 500))
    row = TINY.hidden // 2 + TINY.hidden // 32 * 4
    assert whole - partial == TINY.layers * 2 * 12 * row  # gate and up; down is padded


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("int4_awq", 4 + 16 / 128),
        ("int4_awq_64", 4 + 16 / 64),
        ("nvfp4", 4 + 8 / 16),
        ("mxfp4", 4 + 8 / 32),
        ("mxfp8", 8 + 8 / 32),
        ("fp8", 8),
        ("bf16", 16),
    ],
)
def test_bits_per_weight_have_their_closed_form(name, bits):
    assert catalogue().formats[name].bits_per_weight == bits
    wide = replace(TINY, layers=400, hidden=2048, ffn=8192, heads=16, head_dim=128, vocab=1)
    spent = 8 * (memory_bytes(wide, weight_format=name)["mlp"]) / wide.parts()["mlp"]
    assert spent == pytest.approx(bits, rel=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_memory_is_two_bytes_per_parameter_in_every_part(shape):
    parts = memory_bytes(shape)
    parts.pop("kv_cache")
    assert parts == {part: 2 * count for part, count in shape.parts().items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_a_larger_size_never_takes_less_memory(shape, name):
    for size, step in {"hidden": 16, "ffn": 7, "heads": 2, "kv_heads": 1, "vocab": 3}.items():
        totals = [
            sum(memory_bytes(shape.with_sizes(**{size: value}), weight_format=name).values())
            for value in range(step, 20 * step, step)
        ]
        assert totals == sorted(totals)


def test_the_cache_counts_batch_tokens_precision_and_windows():
    plain = memory_bytes(WINDOWED, batch=3, tokens=256)["kv_cache"]
    assert plain == 3 * 2 * 2 * 64 * 2 * (256 + 5 * 64)
    assert memory_bytes(WINDOWED, batch=3, tokens=256, kv_format="fp8")["kv_cache"] == plain // 2
    assert memory_bytes(WINDOWED, batch=3, tokens=256, kv_format="nvfp4")["kv_cache"] == (
        plain * 9 // 32
    )


def test_memory_in_bfloat16_is_modelopts():
    budget = Budget(memory_mb=1.0, batch=4, tokens=128)
    cache = TINY.layers * 2 * 4 * 128 * TINY.kv_heads * TINY.head_dim * 2
    expected = (TINY.parameters * 2 + cache) / 1024**2
    assert budget.values(TINY)["memory_mb"] == pytest.approx(expected)


@pytest.mark.parametrize("params", [0.5, "50%", " 50 % ", TINY.parameters // 2])
def test_a_share_a_percentage_and_a_count_say_the_same(params):
    limits = Budget(params=params).limits(TINY)
    assert limits == {"params": pytest.approx(TINY.parameters / 2)}


def test_a_model_fits_if_it_keeps_every_limit():
    small = TINY.with_sizes(ffn=256)
    share = small.parameters / TINY.parameters
    assert Budget(params=share + 1e-6).fits(small, TINY)
    assert not Budget(params=share - 1e-6).fits(small, TINY)
    used = sum(memory_bytes(small).values()) / MB
    assert Budget(params=0.99, memory_mb=used).fits(small, TINY)
    assert not Budget(params=0.99, memory_mb=used - 0.01).fits(small, TINY)


def test_active_parameters_leave_out_the_experts_not_chosen():
    fewer = MIXTURE.with_sizes(experts=4)
    assert Budget(params=0.8).fits(fewer, MIXTURE)
    assert not Budget(active_params=0.8).fits(fewer, MIXTURE)


def test_nothing_to_prune_is_a_two_line_error():
    for budget in (Budget(params=10 * TINY.parameters), Budget(memory_mb=1e6)):
        with pytest.raises(ModelError) as caught:
            budget.check(TINY)
        first, second = str(caught.value).splitlines()
        assert "fits the budget unpruned" in first
        assert "ask for less" in second


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, "give at least one of params, active_params, memory_mb and latency"),
        ({"params": 1.0}, "a share lies between 0 and 1"),
        ({"params": 1.5}, "a count is a whole number above 1"),
        ({"params": 0}, "a share lies between 0 and 1"),
        ({"params": "120%"}, "a share lies between 0 and 1"),
        ({"params": "most"}, "write a share below 1, a percentage or a count"),
        ({"params": "nan"}, "a share lies between 0 and 1"),
        ({"active_params": True}, "active_params: write a share"),
        ({"memory_mb": -1}, "memory_mb: Input should be greater than 0"),
        (
            {"memory_mb": 1, "weight_format": "int3"},
            "unknown weight format 'int3'; available: fp32",
        ),
        ({"memory_mb": 1, "kv_format": "int3"}, "unknown key-value cache format 'int3'"),
        ({"latency_ms": 3}, "latency_ms: Extra inputs are not permitted"),
    ],
)
def test_wrong_budgets_are_refused_by_name(settings, problem):
    with pytest.raises(ConfigError) as caught:
        validate(Budget, settings, where="budget")
    assert problem in str(caught.value)


def test_a_budget_round_trips():
    budget = Budget(params="80%", memory_mb=100, weight_format="fp8")
    assert Budget.model_validate(budget.model_dump(mode="json")) == budget
    assert budget.params == 0.8


def test_the_table_of_memory_adds_up():
    rows = memory_table(TINY, formats=["bf16", "int4_awq"], batches=(1, 4), tokens=128)
    order = [("bf16", 1), ("bf16", 4), ("int4_awq", 1), ("int4_awq", 4)]
    assert [(row["format"], row["batch"]) for row in rows] == order
    for row in rows:
        parts = memory_bytes(TINY, weight_format=row["format"], batch=row["batch"], tokens=128)
        assert row["total_mb"] == pytest.approx(sum(parts.values()) / MB)
        assert row["weights_mb"] + row["kv_cache_mb"] == pytest.approx(row["total_mb"])
    assert len(memory_table(TINY, batches=[1])) == len(FORMATS)


def test_an_unknown_format_is_the_callers_mistake():
    with pytest.raises(ValueError, match="available: fp32"):
        memory_bytes(TINY, weight_format="int3")
