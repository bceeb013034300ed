"""Deployed arithmetic against tables and loops that anyone can check."""

import pytest
import torch

from trt_kd.exporters.arithmetic import (
    DeployedLinear,
    fp8_input,
    fp8_weight,
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
