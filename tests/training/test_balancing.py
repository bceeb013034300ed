"""What the terms of an objective share is what the layers pass on, however they are called."""

import pytest
import torch

from trt_kd.training.balancing import shared_by

TOKENS = torch.arange(1, 19).view(2, 9)


@pytest.fixture(params=["by place", "by name"])
def model_and_states(request, make_model, monkeypatch):
    """A model, and the states before each of its layers and behind the last one."""
    model, last = make_model(), []
    hook = model.model.norm.register_forward_pre_hook(lambda _module, given: last.append(given[0]))
    with torch.no_grad():
        made = model(TOKENS, use_cache=False, output_hidden_states=True)
    hook.remove()
    kind = type(model.model.layers[0])
    real = kind.__call__

    def named(self, hidden_states, **rest):
        return real(self, hidden_states=hidden_states, **rest)

    if request.param == "by name":
        monkeypatch.setattr(kind, "__call__", named)
    return model, [*made.hidden_states[:-1], *last]


@pytest.mark.parametrize("place", range(5))
def test_shared_states_are_those_between_the_layers(model_and_states, place):
    model, between = model_and_states
    with torch.no_grad(), shared_by(model, place) as seen:
        model(TOKENS, use_cache=False)
    (found,) = seen
    torch.testing.assert_close(found, between[place], rtol=0, atol=0)
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)


def test_without_a_place_nothing_is_kept(model_and_states):
    model, _ = model_and_states
    with torch.no_grad(), shared_by(model, None) as seen:
        model(TOKENS, use_cache=False)
    assert seen == []
