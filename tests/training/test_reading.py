"""What is read of a layer is what the layer said, in every family."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trt_kd.architectures import ARCHITECTURES, architecture_of
from trt_kd.architectures.shape import shape_from_config
from trt_kd.errors import ModelError
from trt_kd.training.features import width
from trt_kd.training.reading import reading

ATTENTION = ("queries", "keys", "values", "attention")
TOKENS = torch.arange(1, 19).view(2, 9)


@pytest.fixture(params=ARCHITECTURES.names())
def model(request, families):
    return families.tiny(request.param).eval()


def run(model):
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False, output_hidden_states=True)


def test_states_are_the_hidden_states_and_attention_has_the_widths_of_the_shape(model):
    before = run(model)
    wanted = [(0, "states"), *((1, what) for what in ATTENTION)]
    with reading(model, wanted) as seen:
        after = run(model)
    assert set(seen) == set(wanted)
    torch.testing.assert_close(seen[0, "states"], before.hidden_states[1], rtol=0, atol=0)
    torch.testing.assert_close(after.logits, before.logits, rtol=0, atol=0)
    shape = shape_from_config(model.config.to_dict())
    for layer, what in wanted:
        assert seen[layer, what].shape == (2, 9, width(shape, what))


def test_nothing_stays_behind(model):
    def hooks():
        return [len(module._forward_hooks) for module in model.modules()]

    table = dict(ALL_ATTENTION_FUNCTIONS)
    run(model)  # the library may put hooks of its own
    before = hooks()
    with reading(model, [(0, "states"), (0, "keys")]):
        run(model)
    assert dict(ALL_ATTENTION_FUNCTIONS) == table
    assert hooks() == before
    with pytest.raises(RuntimeError), reading(model, [(0, "keys")]):
        raise RuntimeError
    assert dict(ALL_ATTENTION_FUNCTIONS) == table


def test_queries_keys_and_values_are_those_that_make_the_attention(make_model):
    model = make_model()
    heard = []
    attention = architecture_of("llama").layers(model)[2].self_attn
    attention.o_proj.register_forward_pre_hook(lambda _module, inputs: heard.append(inputs[0]))
    with reading(model, [(2, what) for what in ATTENTION]) as seen:
        run(model)
    heads = {what: seen[2, what].unflatten(-1, (-1, 16)).transpose(1, 2) for what in ATTENTION[:3]}
    keys, values = (heads[what].repeat_interleave(2, 1) for what in ("keys", "values"))
    scores = heads["queries"] @ keys.mT / 4.0
    scores = scores.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -torch.inf)
    expected = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(heard[0], expected)
    queries, keys, values = (
        part.unflatten(-1, (-1, 16)).transpose(1, 2) for part in seen[2, "attention"].chunk(3, -1)
    )
    scores = (queries @ keys.mT).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    together = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(together, heard[0])


def test_two_models_can_be_read_at_once(make_model):
    one, other = make_model(1), make_model(2)
    wanted = [(0, "values")]
    with reading(one, wanted) as first, reading(other, wanted) as second:
        run(one)
        run(other)
    assert not torch.equal(first[0, "values"], second[0, "values"])


def test_attention_that_cannot_be_watched_is_refused(make_model):
    model = make_model()
    model.config._attn_implementation = "eager"
    with pytest.raises(ModelError, match="runs as 'eager'"), reading(model, [(0, "keys")]):
        pass
