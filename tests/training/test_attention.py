"""Attention by blocks of queries is causal attention, and takes the place of nothing else."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trt_kd.training.attention import attending_by, blockwise_attention

WIDTH = 16


def states(length, *, heads=6, groups=2, batch=2, dtype=torch.bfloat16, keys=None):
    """Queries, keys and values as transformers gives them, with gradients wanted."""
    generator = torch.Generator().manual_seed(length)

    def made(count, positions):
        one = torch.randn(batch, positions, count, WIDTH, generator=generator)
        return one.to(dtype).transpose(1, 2).requires_grad_()

    return made(heads, length), made(groups, keys or length), made(groups, keys or length)


def attend(states, mask=None, *, module=None, **options):
    function = ALL_ATTENTION_FUNCTIONS["sdpa"]
    module = module or nn.Module()
    module.num_key_value_groups = states[0].shape[1] // states[1].shape[1]
    return function(module, *states, mask, **options)[0]


def blockwise(states, *arguments, **options):
    with blockwise_attention():
        return attend(states, *arguments, **options)


def exact(states, scale):
    """Output and gradients in float64, written out."""
    query, key, value = (one.detach().double().requires_grad_() for one in states)
    shared = query.shape[1] // key.shape[1]
    keys, values = (one.repeat_interleave(shared, dim=1) for one in (key, value))
    scores = query @ keys.mT * scale
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    shares = scores.masked_fill(later, -torch.inf).exp()
    output = (shares / shares.sum(-1, keepdim=True) @ values).transpose(1, 2)
    return with_gradients(output, (query, key, value))


def with_gradients(output, leaves):
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent.to(output.dtype))]


def errors(found, reference):
    return [
        float((one.double() - right).norm() / right.norm())
        for one, right in zip(found, reference, strict=True)
    ]


@pytest.mark.parametrize("length", [2, 63, 64, 65, 200, 600])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (3, 3), (4, 1)])
def test_output_and_gradients_are_as_near_to_the_formula_as_torchs(length, heads, groups):
    given = states(length, heads=heads, groups=groups)
    reference = exact(given, WIDTH**-0.5)
    found = errors(with_gradients(blockwise(given), given), reference)
    torchs = errors(with_gradients(attend(given), given), reference)
    assert all(ours <= 2.5 * theirs for ours, theirs in zip(found, torchs, strict=True))


def test_the_scale_of_a_model_is_kept():
    given = states(70)
    found = with_gradients(blockwise(given, scaling=0.5), given)
    assert max(errors(found, exact(given, 0.5))) < 0.02


def test_under_autocast_it_narrows_as_torch_does():
    given = states(70, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(blockwise(given), given)
        torchs = with_gradients(attend(given), given)
    assert [one.dtype for one in found] == [one.dtype for one in torchs]
    reference = exact(given, WIDTH**-0.5)
    assert max(errors(found, reference)) <= 2.5 * max(errors(torchs, reference))
    assert not torch.equal(found[0], torchs[0])


def test_no_output_hears_of_later_positions():
    given = states(130)
    before = blockwise(given)
    with torch.no_grad():
        for one in given:
            one[:, :, 100:] += 1.0
    assert torch.equal(blockwise(given)[:, :100], before[:, :100])


def test_only_the_inputs_are_kept_for_the_backward_pass():
    given = states(128)
    own = {one.untyped_storage().data_ptr() for one in given}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        blockwise(given)
    assert {one.untyped_storage().data_ptr() for one in kept} == own


def masked(length):
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[:, 0] = False
    mask[0, 0] = True
    return mask[None, None]


OTHER = {
    "a mask": lambda: (states(8), masked(8)),
    "float32": lambda: (states(8, dtype=torch.float32),),
    "one query": lambda: (states(1, keys=8),),
    "an encoder": lambda: (states(8), None, {"is_causal": False}),
    "keys of an earlier call": lambda: (states(4, keys=8), masked(8)[:, :, 4:]),
}


@pytest.mark.parametrize("case", OTHER)
def test_anything_else_goes_the_usual_way(case):
    given, mask, options = (*OTHER[case](), None, None)[:3]
    found = blockwise(given, mask, **(options or {}))
    assert torch.equal(found, attend(given, mask, **(options or {})))


def test_a_module_that_is_not_causal_goes_the_usual_way():
    module = nn.Module()
    module.is_causal = False
    given = states(8)
    everything = scaled_dot_product_attention(*given, enable_gqa=True).transpose(1, 2)
    assert torch.equal(blockwise(given, module=module), everything)


def test_it_ends_with_its_block():
    plain, wrong = ALL_ATTENTION_FUNCTIONS["sdpa"], states(8, heads=5)
    with pytest.raises(RuntimeError), blockwise_attention():
        attend(wrong)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is plain


def answering(number):
    return lambda _plain: lambda *_, **__: (number, None)


def test_an_override_around_it_is_there_again_after_it_and_one_inside_goes():
    plain, given = ALL_ATTENTION_FUNCTIONS["sdpa"], states(8)
    local = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    with attending_by("sdpa", answering(1)):
        with blockwise_attention(), attending_by("sdpa", answering(2)):
            assert attend(given) == 2
        assert attend(given) == 1
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is plain
    assert ALL_ATTENTION_FUNCTIONS._local_mapping == local


def test_overrides_of_another_name_stay_as_they_are():
    with attending_by("sdpa", answering(1)):
        with attending_by("flash_attention_2", answering(2)):
            assert ALL_ATTENTION_FUNCTIONS["flash_attention_2"]() == (2, None)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"]() == (1, None)
    with pytest.raises(KeyError), attending_by("none such", answering(1)):
        pass
