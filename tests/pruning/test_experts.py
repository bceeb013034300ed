"""What the axes of a mixture see of it, against definitions written out on the saved weights."""

import pytest

from trt_kd.architectures import architecture_of
from trt_kd.architectures.shape import shape_from_config
from trt_kd.errors import ModelError
from trt_kd.pruning import AXES
from trt_kd.pruning.base import WidthAxis
from trt_kd.pruning.sizes import planned_shape

NAMES = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}


@pytest.fixture(params=[("mixtral", True), ("qwen3_moe", True), ("qwen3_moe", False)], ids=str)
def mixture(request, families, tmp_path):
    """(model, experts of the first layer that has them, inputs [B, L, H], expected by expert)."""
    import torch
    from safetensors.torch import load_file
    from torch.nn.functional import silu

    model_type, normalized = request.param
    changes = {} if model_type == "mixtral" else {"norm_topk_prob": normalized}
    model = families.tiny(model_type, mlp_only_layers=None, **changes)
    experts = architecture_of(model_type).experts(architecture_of(model_type).layers(model)[0])
    inputs_BLH = torch.randn(2, 12, 64)
    model.save_pretrained(tmp_path)  # both versions of transformers write the same names
    block = "block_sparse_moe" if model_type == "mixtral" else "mlp"
    saved = load_file(tmp_path / "model.safetensors")
    weights = {k.split(f"layers.0.{block}.")[1]: v for k, v in saved.items() if f".0.{block}." in k}
    probability_TE = (inputs_BLH.flatten(0, 1) @ weights["gate.weight"].T).softmax(-1)
    expected = []
    for expert in range(6):
        gate, up, down = (weights[f"experts.{expert}.{n}.weight"] for n in NAMES[model_type])
        rows = []
        for token, x_H in enumerate(inputs_BLH.flatten(0, 1)):
            best = probability_TE[token].sort(descending=True)
            if expert not in best.indices[:2]:
                continue
            weight = probability_TE[token, expert]
            weight = weight / best.values[:2].sum() if normalized else weight
            channels_C = silu(gate @ x_H) * (up @ x_H)
            rows.append((token, weight, channels_C, weight * (down @ channels_C)))
        expected.append(rows)
    return model, experts, inputs_BLH, expected


def test_the_experts_of_a_block_add_up_to_its_output(mixture):
    import torch

    _, experts, inputs_BLH, expected = mixture
    inputs_TH = inputs_BLH.flatten(0, 1)
    sum_TH, by_hand_TH = torch.zeros_like(inputs_TH), torch.zeros_like(inputs_TH)
    with torch.no_grad():
        for expert, (tokens_S, weights_S, channels_SC) in enumerate(experts.visits(inputs_TH)):
            sum_TH[tokens_S] += weights_S[:, None] * experts.outputs(expert, channels_SC)
            for token, _, _, output_H in expected[expert]:
                by_hand_TH[token] += output_H
        block = experts.module(inputs_BLH)
    output_BLH = block[0] if isinstance(block, tuple) else block
    torch.testing.assert_close(sum_TH, output_BLH.flatten(0, 1))
    torch.testing.assert_close(by_hand_TH, output_BLH.flatten(0, 1))


def test_an_experts_mean_size_is_that_over_its_own_tokens(mixture):
    import torch

    from trt_kd.pruning.experts import expert_states

    _, experts, inputs_BLH, expected = mixture
    states_BLE = expert_states(experts, inputs_BLH)
    assert states_BLE.shape == (2, 12, 6)
    for sequence in range(2):
        for expert, rows in enumerate(expected):
            sizes = [float(row[3].norm()) for row in rows if row[0] // 12 == sequence]
            mean = sum(sizes) / max(1, len(sizes))
            found = float(states_BLE[sequence, :, expert].mean())
            assert found == pytest.approx(mean, rel=1e-4)
    assert torch.equal((states_BLE > 0).sum(-1), torch.full((2, 12), 2))


def test_an_experts_channels_are_seen_over_its_own_tokens(mixture):
    import torch

    from trt_kd.pruning.experts import channel_states

    _, experts, inputs_BLH, expected = mixture
    width = experts.width
    total_N = channel_states(experts, inputs_BLH).abs().sum(dim=(0, 1))
    for expert, rows in enumerate(expected):
        by_hand_C = sum((row[2].abs() for row in rows), start=torch.zeros(width))
        found_C = total_N[expert * width : (expert + 1) * width]
        torch.testing.assert_close(found_C, by_hand_C, rtol=1e-4, atol=1e-6)


def test_an_expert_that_no_token_is_sent_to_scores_zero(families):
    import torch

    from trt_kd.pruning.experts import channel_states, expert_states

    model = families.tiny("mixtral")
    experts = architecture_of("mixtral").experts(architecture_of("mixtral").layers(model)[0])
    with torch.no_grad():
        experts.router.weight.copy_(torch.tensor([2.0, -1.0, 1.0, 0.0, -1.0, 0.0])[:, None])
    inputs_BLH = torch.ones(1, 3, 64)
    sent = [True, False, True, False, False, False]
    assert (expert_states(experts, inputs_BLH).sum(dim=(0, 1)) > 0).tolist() == sent
    channels_E = channel_states(experts, inputs_BLH).unflatten(-1, (6, -1)).abs().sum((0, 1, 3))
    assert (channels_E > 0).tolist() == sent


def test_a_layer_keeps_as_many_experts_as_a_token_is_sent_to(families):
    shape = shape_from_config(families.tiny("mixtral").config.to_dict())
    axis = AXES.load("experts")
    assert axis().legal(shape) == [2, 3, 4, 5, 6]
    with pytest.raises(ModelError, match="1 is off the grid") as caught:
        planned_shape([axis(size=1)], None, shape)
    assert "nearest" in caught.value.hint


def test_channels_are_chosen_expert_by_expert(families):
    import torch

    shape = shape_from_config(families.tiny("qwen3_moe").config.to_dict())
    axis = AXES.load("expert_ffn")(size=8, multiple_of=8)
    scores_EC = torch.rand(6, 32)
    (keep_N,) = axis.keep([scores_EC.flatten()], shape)
    for expert, keep_K in enumerate(keep_N.view(6, 8)):
        best = scores_EC[expert].topk(8).indices.sort().values
        assert torch.equal(keep_K - expert * 32, best)


def test_every_width_axis_ranks_as_many_units_as_it_cuts(families):
    for model_type in families.FAMILIES:
        model = families.tiny(model_type)
        shape = shape_from_config(model.config.to_dict())
        lacking = architecture_of(model_type).axes(shape)
        for kind in families.KINDS:
            axis = None if lacking[kind] else families.halved(kind, shape)
            if not isinstance(axis, WidthAxis):
                continue
            places = axis.places(model, architecture_of(model_type))
            kept = axis.keep(families.scores(model, places), shape)
            count = {"heads": shape.kv_heads, "expert_ffn": shape.experts}.get(kind, 1)
            assert {len(keep_K) for keep_K in kept} == {axis.target(shape) * count}
