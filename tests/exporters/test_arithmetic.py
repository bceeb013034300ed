"""Deployed arithmetic against tables and loops that anyone can check."""

import pytest
import torch

from trt_kd.exporters.arithmetic import (
    DeployedLinear,
    fp8_block_weight,
    fp8_channel_weight,
    fp8_input,
    fp8_token_input,
    fp8_weight,
    int4_fp8_weight,
    int4_weight,
    int8_input,
    int8_weight,
)


def e4m3(code: int) -> float:
    """Value of an E4M3 byte by the definition: 1 sign, 4 exponent (bias 7), 3 mantissa bits."""
    sign, exponent, mantissa = -1 if code >> 7 else 1, code >> 3 & 15, code & 7
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def test_fp8_codes_mean_what_the_definition_says():
    codes = [c for c in range(256) if c & 127 != 127]  # 127 is not a number
    stored = torch.tensor(codes, dtype=torch.uint8).view(torch.float8_e4m3fn)[None]
    expected = torch.tensor([[0.5 * e4m3(c) for c in codes]])
    assert torch.equal(fp8_weight(stored, torch.tensor(0.5)), expected)


def test_fp8_inputs_go_to_the_nearest_code_and_saturate():
    table = torch.tensor(sorted({e4m3(c) for c in range(256) if c & 127 != 127}))
    x = torch.linspace(-1000, 1000, 4001)
    rounded = fp8_input(x * 0.25, torch.tensor(0.25)) / 0.25
    nearest = (x[:, None] - table).abs().amin(1)
    assert torch.equal((x - rounded).abs(), nearest)
    assert rounded.max() == 448


def test_int8_inputs_are_rounded_and_clamped():
    x = torch.tensor([-1000.0, -2.6, -0.4, 0.4, 1.6, 1000.0])
    expected = torch.tensor([-64.0, -2.5, -0.5, 0.5, 1.5, 63.5])
    assert torch.equal(int8_input(x, torch.tensor(0.5)), expected)


def test_int8_weights_have_one_scale_per_output():
    codes = torch.tensor([[1, -2, 127], [3, 0, -128]], dtype=torch.int8)
    weight = int8_weight(codes, torch.tensor([0.5, 2.0]))
    assert weight.tolist() == [[0.5, -1.0, 63.5], [6.0, 0.0, -256.0]]


def test_int4_weights_are_two_outputs_to_a_byte():
    codes = torch.tensor([[1, -8, 7, 0], [-1, 2, -3, 4]])
    packed = torch.tensor(
        [[(codes[0, i] & 15) | ((codes[1, i] & 15) << 4) for i in range(4)]], dtype=torch.uint8
    )
    weight = int4_weight(packed, torch.tensor([[1.0, 10.0], [2.0, 0.5]]))
    assert weight.tolist() == [[1.0, -8.0, 70.0, 0.0], [-2.0, 4.0, -1.5, 2.0]]


def test_a_deployed_layer_scales_then_rounds_then_multiplies():
    layer = DeployedLinear(
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([0.25]),
        pre_quant_scale_I=torch.tensor([10.0, 1.0]),
        round_input=torch.round,
    )
    assert layer(torch.tensor([0.26, 1.4])).item() == pytest.approx(3.0 + 2.0 + 0.25)


def test_fp8_weights_may_have_a_scale_per_output_or_per_block():
    codes = torch.arange(16.0).reshape(4, 4).to(torch.float8_e4m3fn)
    per_channel = fp8_channel_weight(codes, torch.tensor([1.0, 2.0, 4.0, 8.0]))
    assert per_channel[:, 3].tolist() == [3.0, 14.0, 44.0, 120.0]
    scale = torch.tensor([[1.0, 10.0], [100.0, 0.5]])
    expected = [[0, 1, 20, 30], [4, 5, 60, 70], [800, 900, 5, 5.5], [1200, 1300, 7, 7.5]]
    assert fp8_block_weight(codes, scale, 2).tolist() == expected
    assert fp8_block_weight(codes, scale[:, None, :, None], 2).tolist() == expected


def test_every_token_has_an_fp8_scale_of_its_own_and_zeros_stay_zeros():
    x = torch.tensor([[1.0, -2.0, 0.3], [1e4, 5.0, 0.0], [0.0, 0.0, 0.0]])
    expected = torch.stack([fp8_input(row, row.abs().max() / 448) for row in x[:2]])
    assert torch.equal(fp8_token_input(x)[:2], expected)
    assert torch.equal(fp8_token_input(x)[2], torch.zeros(3))
    assert torch.equal(fp8_token_input(x[:1]), fp8_token_input(x)[:1]), "tokens apart"


def test_an_int4_weight_for_fp8_products_is_rounded_twice():
    packed = torch.tensor([[7 | (5 << 4)]], dtype=torch.uint8)
    scale, second = torch.tensor([[0.3], [0.1]]), torch.tensor(0.01)
    once = int4_weight(packed, scale)
    assert torch.equal(int4_fp8_weight(packed, scale, second), fp8_input(once, second))
    assert int4_fp8_weight(packed, scale, second)[0].item() == pytest.approx(2.08)  # not 2.1
