"""What the terms of an objective share is what the layers pass on, however they are called."""

import pytest
import torch

from trt_kd.training.balancing import shared_by

TOKENS = torch.arange(1, 19).view(2, 9)


@pytest.fixture(params=["by place", "by name"])
def model(request, make_model, monkeypatch):
    made = make_model()
    if request.param == "by name":
        kind = type(made.model.layers[0])
        real = kind.__call__

        def named(self, hidden_states, **rest):
            return real(self, hidden_states=hidden_states, **rest)

        monkeypatch.setattr(kind, "__call__", named)
    return made


@pytest.mark.parametrize("place", range(5))
def test_shared_states_are_those_between_the_layers(model, place):
    states = []
    hook = model.model.norm.register_forward_pre_hook(lambda _module, given: states.append(given))
    with torch.no_grad(), shared_by(model, place) as seen:
        made = model(TOKENS, use_cache=False, output_hidden_states=True)
    hook.remove()
    between = [*made.hidden_states[:-1], states[0][0]]
    (found,) = seen
    torch.testing.assert_close(found, between[place], rtol=0, atol=0)
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)


def test_without_a_place_nothing_is_kept(model):
    with torch.no_grad(), shared_by(model, None) as seen:
        model(TOKENS, use_cache=False)
    assert seen == []
