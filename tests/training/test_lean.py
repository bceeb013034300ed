"""A trunk with lean parts gives what plain autograd gives and keeps less for it."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from trt_kd.architectures import ARCHITECTURES
from trt_kd.losses.kl import ForwardKL
from trt_kd.training import loop
from trt_kd.training.head import Objective
from trt_kd.training.lean import lean
from trt_kd.training.run import Run, Text
from trt_kd.training.schedule import Schedule

TOKENS = torch.arange(2 * 16).view(2, 16) * 7 % 97
SAVED = {"gpt_neox": 0.6, "mixtral": 0.75, "qwen3_moe": 0.55}
"""Most bytes over the plain trunk's under autocast; experts and LayerNorm stay plain."""
SAVED_ELSE = 0.35


@pytest.fixture(params=ARCHITECTURES.names())
def model(request, families):
    return families.tiny(request.param).train()


def run(model, *, bf16=False, sharded=False):
    """Hidden states, gradients of all parameters and bytes kept for them, in one pass."""
    trunk = next(part for part in (model.base_model, model.get_decoder()) if part is not model)
    parameters = dict(trunk.named_parameters())
    own = {one.untyped_storage().data_ptr() for one in parameters.values() if not sharded}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if not sharded and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        hidden = trunk(input_ids=TOKENS, use_cache=False)[0]
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
    hidden.backward(cotangent.to(hidden.dtype))
    size = sum(storage.nbytes() for storage in kept.values())
    gradients = {name: one.grad.clone() for name, one in parameters.items() if one.grad is not None}
    model.zero_grad()
    return hidden.detach(), gradients, size


def both(model, **options):
    plain = run(model, **options)
    with lean(model):
        return run(model, **options), plain


def error(found, exact):
    """Root mean square over all tensors of the relative error of each."""
    parts = [
        (found[name].double() - one.double()).norm() / one.double().norm().clamp(min=1e-30)
        for name, one in exact.items()
    ]
    return float(torch.stack(parts).square().mean().sqrt())


def assert_same(found, plain, limit=1e-5):
    assert found[0].dtype == plain[0].dtype
    assert error({"": found[0]}, {"": plain[0]}) < limit
    assert found[1].keys() == plain[1].keys()
    assert error(found[1], plain[1]) < limit


def test_hidden_states_and_every_gradient_are_those_of_plain_autograd(model):
    found, plain = both(model)
    assert_same(found, plain)


def test_under_bf16_autocast_gradients_are_as_near_to_the_exact_ones_as_plain_ones(model):
    exact = run(model)
    found, plain = both(model, bf16=True)
    assert found[0].dtype == plain[0].dtype
    assert found[1].keys() == plain[1].keys()
    assert error({"": found[0]}, {"": exact[0]}) < 1.1 * error({"": plain[0]}, {"": exact[0]})
    assert error(found[1], exact[1]) < 1.15 * error(plain[1], exact[1])


def test_less_is_kept_for_the_backward_pass(model):
    found, plain = both(model, bf16=True)
    assert found[2] < SAVED.get(model.config.model_type, SAVED_ELSE) * plain[2]
    found, plain = both(model)
    assert found[2] <= plain[2]


@pytest.mark.parametrize("name", sorted({*ARCHITECTURES.names()} - {"mixtral", "qwen3_moe"}))
def test_a_float64_trunk_is_the_same_too(name, families):
    model = families.tiny(name).double().train()  # the library's experts take no float64
    found, plain = both(model)
    assert_same(found, plain, limit=2e-6)  # norms are float32 in the library itself


@pytest.mark.parametrize(
    "act", ["silu", "relu", "gelu", "gelu_pytorch_tanh", "gelu_new", "quick_gelu", "mish"]
)
@pytest.mark.parametrize("bf16", [False, True])
def test_any_activation_and_biases_are_right(act, bf16, families):
    changes = {"hidden_act": act, "attention_bias": True, "mlp_bias": True}
    model = families.tiny("llama", num_hidden_layers=2, **changes).train()
    exact = run(model)
    found, plain = both(model, bf16=bf16)
    if bf16:
        assert error(found[1], exact[1]) < 1.15 * error(plain[1], exact[1])
    else:
        assert_same(found, plain)


def test_nothing_is_left_afterwards_and_names_never_change(model):
    names = list(model.state_dict())
    with lean(model) as counts:
        assert list(model.state_dict()) == names
        assert any("forward" in vars(module) for module in model.modules())
        assert "forward" not in vars(model.get_output_embeddings())
    assert sum(counts.values()) > 0
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_an_error_inside_undoes_it_too(model):
    with pytest.raises(KeyError), lean(model):
        raise KeyError
    assert not any("forward" in vars(module) for module in model.modules())


def counts_with(model, **parts):
    """Counts of lean parts after parts of the first layer were replaced."""
    layer = model.model.layers[0]
    for name, module in parts.items():
        setattr(layer, name, module)
    found, plain = both(model)
    assert_same(found, plain)
    with lean(model) as counts:
        return counts


def test_a_norm_or_mlp_that_computes_something_else_stays_plain(make_model):
    def changed(module, change):
        plain = type(module).forward

        class LlamaRMSNorm(type(module)):
            def forward(self, x):
                return change(plain(self, x))

        module.__class__ = LlamaRMSNorm
        return module

    before = counts_with(make_model(num_hidden_layers=2))
    assert (before["norms"], before["mlps"]) == (5, 2)
    model = make_model(num_hidden_layers=2)
    layer = model.model.layers[0]
    assert counts_with(model, input_layernorm=changed(layer.input_layernorm, lambda y: y + 1e-3))[
        "norms"
    ] == (before["norms"] - 1)
    assert counts_with(model, mlp=changed(layer.mlp, lambda y: 1.001 * y))["mlps"] == 1
    layer_norm = nn.LayerNorm(64, bias=False)
    assert counts_with(model, post_attention_layernorm=layer_norm)["norms"] == 3


def test_a_part_of_another_name_that_proves_itself_is_taken(make_model):
    class Anything(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.rand(64)), 0.25

        def forward(self, rows):
            return rows / (rows.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight

    model = make_model(num_hidden_layers=2)
    assert counts_with(model, input_layernorm=Anything())["norms"] == 5


def test_hooked_parts_are_still_called(make_model):
    model = make_model()
    plain = run(model)
    seen = []
    linear = model.model.layers[1].mlp.down_proj
    with lean(model):
        handle = linear.register_forward_hook(lambda _module, _inputs, y: seen.append(y))
        hooked = run(model)
        handle.remove()
        run(model)
    assert len(seen) == 1
    assert_same(hooked, plain)


def test_a_module_with_a_forward_of_its_own_keeps_it(make_model):
    model = make_model()
    mlp = model.model.layers[0].mlp
    mlp.forward = own = lambda x: 2 * type(mlp).forward(mlp, x)
    plain = run(model)
    with lean(model) as counts:
        assert_same(run(model), plain)
    assert counts["mlps"] == 3
    assert mlp.forward is own


def test_an_mlp_one_of_whose_parts_was_replaced_stays_plain(make_model):
    model = make_model()
    up = model.model.layers[0].mlp.up_proj
    up.forward = own = type(up).forward.__get__(up)
    with lean(model) as counts:
        assert (counts["mlps"], counts["linears"]) == (3, 27)
    assert up.forward is own


def test_a_forward_set_meanwhile_is_left(make_model):
    model = make_model()
    mlp = model.model.layers[0].mlp
    with lean(model):
        mlp.forward = own = type(mlp).forward.__get__(mlp)
    assert mlp.forward is own


def test_frozen_weights_get_no_gradient_and_the_rest_keeps_its_own(make_model):
    model = make_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name and "gate" not in name)
    for bf16 in (False, True):
        found, plain = both(model, bf16=bf16)
        assert found[1].keys() == plain[1].keys()
        assert error(found[1], plain[1]) < (0.02 if bf16 else 1e-5)


def test_a_norm_weight_of_zero_keeps_its_gradient(make_model):
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = 0.0
        model.model.layers[0].post_attention_layernorm.weight[::2] = 0.0
    found, plain = both(model)
    assert_same(found, plain)
    assert plain[1]["layers.0.input_layernorm.weight"][3] != 0.0


def test_checkpointed_layers_are_the_same(make_model):
    model = make_model().train()
    plain = run(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with lean(model):
        found = run(model)
    assert_same(found, plain)


def test_random_numbers_are_left_where_they_were(make_model):
    model = make_model(attention_dropout=0.5).train()
    state = torch.get_rng_state()
    with lean(model):
        assert torch.equal(torch.get_rng_state(), state)


def test_sharded_parameters_give_the_same(make_model, tmp_path):
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    model = make_model(num_hidden_layers=2)
    plain = run(model)
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        with lean(model):
            mesh = distributed.init_device_mesh("cpu", (1,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model.model, mesh=mesh)
            hidden, gradients, _ = run(model, sharded=True)
            full = {name: gradient.full_tensor() for name, gradient in gradients.items()}
    finally:
        distributed.destroy_process_group()
    assert_same((hidden, full), plain)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_is_the_same_with_lean_parts(make_model, tmp_path, monkeypatch, precision):
    blocks = np.arange(8 * 32).reshape(8, 32) * 5 % 512
    schedule = Schedule(steps=4, batch_size=1, gradient_accumulation=2, precision=precision)
    logs = []
    for name, context in (("lean", lean), ("plain", nullcontext)):
        monkeypatch.setattr(loop, "lean", context)
        student = make_model(num_hidden_layers=2)
        log = loop.train(
            student,
            make_model(seed=1),
            Text(blocks),
            objective_at=lambda step: Objective(ForwardKL(), 0.0, 1.0),
            run=Run(schedule, tmp_path / name),
        )
        logs.append([step["loss_nats_per_token"] for step in log.steps])
    np.testing.assert_allclose(*logs, rtol=2e-2 if precision == "bf16" else 1e-5)
