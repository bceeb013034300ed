"""Laws of every axis of every family: dead units go unnoticed, sizes are as planned, files load."""

from dataclasses import dataclass
from typing import Any

import pytest

from trt_kd.architectures import ARCHITECTURES, architecture_of
from trt_kd.architectures.shape import shape_from_config
from trt_kd.checkpoints import load_model, save_model
from trt_kd.errors import ModelError
from trt_kd.pruning import AXES

pytestmark = pytest.mark.filterwarnings("ignore:The attention mask")

DENSE = ("hidden", "ffn", "heads", "kv_heads", "depth")
MIXTURE = ("hidden", "heads", "kv_heads", "experts", "expert_ffn", "depth")
HAS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2"), DENSE),
    **dict.fromkeys(("gemma2", "gemma3_text", "phi3"), DENSE),
    "gpt_neox": ("ffn", "depth"),
    "mixtral": MIXTURE,
    "qwen3_moe": (*MIXTURE, "ffn"),
}
WRITERS = ("o_proj", "down_proj", "w2", "attention.dense", "dense_4h_to_h")
"""Ends of the names of modules that write to the residual stream, in all families."""
CASES = [(name, kind, tied) for name in HAS for kind in HAS[name] for tied in (True, False)]


@dataclass
class Cut:
    """A model with dead units before and after they were cut."""

    model: Any
    kind: str
    before: Any
    after: Any
    planned: Any


def axis_of(kind, shape, drop=(1,)):
    """An axis with about half of its size, or that drops the second layer."""
    if kind == "depth":
        return AXES.load(kind)(drop=list(drop))
    size = {"heads": 1, "experts": 4}.get(kind) or AXES.load(kind)().read(shape) // 2
    return AXES.load(kind)(size=size, multiple_of=1)


def choose(axis, shape, model):
    """Units to keep, at random, one tensor per place."""
    import torch

    if axis.kind == "depth":
        return axis.keep([torch.zeros(())] * shape.layers, shape)
    units = {
        "heads": shape.heads,
        "expert_ffn": shape.experts * shape.expert_ffn,
    }.get(axis.kind) or axis.read(shape)
    places = axis.places(model, architecture_of(shape.model_type))
    return axis.keep([torch.rand(units) for _ in places], shape)


def writers(layer):
    """(what, weight, dimension of the hidden size) of all that a layer adds to the stream."""
    for name, parameter in layer.named_parameters():
        owner = name.removesuffix(".weight").removesuffix(".bias")
        if owner.endswith(WRITERS):
            yield owner, parameter, parameter.dim() - 2 if parameter.dim() > 1 else 0


def columns(layer, name):
    """The weight of the module with that end of its name."""
    (found,) = (p for n, p in layer.named_parameters() if n.endswith((f"{name}.weight", name)))
    return found


def dead(keep_K, units):
    """The units that are not kept."""
    return sorted(set(range(units)) - set(keep_K.tolist()))


def kill(model, kind, keep, shape):
    """Zero the units that are not in ``keep``, found by the names of parameters alone."""
    layers = architecture_of(shape.model_type).layers(model)
    if kind == "hidden":
        gone = dead(keep[0], shape.hidden)
        model.get_input_embeddings().weight[:, gone] = 0.0
        for layer in layers:
            for _, parameter, dim in writers(layer):
                parameter.index_fill_(dim, index(gone), 0.0)
        return
    if kind == "depth":
        for number in dead(keep[0], shape.layers):
            for _, parameter, _ in writers(layers[number]):
                parameter.zero_()
        return
    moe = [layer for layer in layers if any("expert" in n for n, _ in layer.named_modules())]
    chosen = {"experts": moe, "expert_ffn": moe, "ffn": [x for x in layers if x not in moe]}
    for layer, keep_K in zip(chosen.get(kind, layers), keep, strict=True):
        KILLERS[kind](layer, keep_K, shape)


def index(numbers):
    import torch

    return torch.tensor(numbers)


def kill_channels(layer, keep_K, shape):
    name = "dense_4h_to_h" if shape.model_type == "gpt_neox" else "down_proj"
    columns(layer, name)[:, dead(keep_K, shape.ffn)] = 0.0


def kill_heads(layer, keep_K, shape, units=None, also=("q",)):
    o = columns(layer, "o_proj")
    for unit in dead(keep_K, units or shape.heads):
        width = shape.heads * shape.head_dim // (units or shape.heads)
        o[:, unit * width : (unit + 1) * width] = 0.0
        for name in also if shape.qk_norm == "full" else ():  # these are normed over all heads
            part = width if name == "q" else shape.head_dim
            columns(layer, f"{name}_proj")[unit * part : (unit + 1) * part] = 0.0


def kill_groups(layer, keep_K, shape):
    kill_heads(layer, keep_K, shape, units=shape.kv_heads, also=("q", "k"))


def kill_experts(layer, keep_K, shape):
    """Rows of the router in pairs of opposite sign always win against rows of zeros."""
    router = columns(layer, "gate")
    router[dead(keep_K, shape.experts)] = 0.0
    router[keep_K[1::2]] = -router[keep_K[::2]]


def kill_expert_channels(layer, keep_K, shape):
    for unit in dead(keep_K, shape.experts * shape.expert_ffn):
        expert, channel = divmod(unit, shape.expert_ffn)
        names = (f"experts.{expert}.down_proj.weight", f"experts.{expert}.w2.weight")
        for name, parameter in layer.named_parameters():
            if name.endswith("experts.down_proj"):
                parameter[expert, :, channel] = 0.0
            elif name.endswith(names):
                parameter[:, channel] = 0.0


KILLERS = {
    "ffn": kill_channels,
    "heads": kill_heads,
    "kv_heads": kill_groups,
    "experts": kill_experts,
    "expert_ffn": kill_expert_channels,
}


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def cut(request, families):
    import torch

    model_type, kind, tied = request.param
    eps = {} if model_type == "gpt_neox" else {"rms_norm_eps": 1e-12}
    model = families.tiny(model_type, tie_word_embeddings=tied, **eps)
    shape = shape_from_config(model.config.to_dict())
    axis = axis_of(kind, shape)
    keep = choose(axis, shape, model)
    with torch.no_grad():
        kill(model, kind, keep, shape)
    before = families.logits(model)
    axis.cut(model, architecture_of(model_type), keep)
    planned = axis.write(shape, axis.target(shape))
    return Cut(model, kind, before, families.logits(model), planned)


def test_cutting_dead_units_changes_nothing(cut):
    import torch

    torch.testing.assert_close(cut.after, cut.before, rtol=1e-4, atol=1e-5)
    assert cut.before.std() > 0.01


def test_parameters_are_as_planned(cut):
    shape = shape_from_config(cut.model.config.to_dict())
    assert shape.parameters == cut.model.num_parameters()
    if cut.kind != "depth":  # which layers go decides how many of each kind stay
        assert shape == cut.planned


def test_it_comes_back_from_disk_as_it_went(cut, families, tmp_path):
    import torch

    save_model(cut.model, tmp_path, tokenizer_from=tmp_path)
    loaded = load_model(tmp_path)
    for parameter in loaded.parameters():  # a mapped file is aligned otherwise: other kernels
        parameter.data = parameter.data.clone()
    weights, there = loaded.state_dict(), cut.model.state_dict()
    assert weights.keys() == there.keys()
    assert all(torch.equal(weights[name], there[name]) for name in there)
    assert torch.equal(families.logits(loaded), cut.after)
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == cut.model.config.tie_word_embeddings
    tokens = loaded.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] > 3


@pytest.mark.parametrize("model_type", HAS)
@pytest.mark.parametrize("kinds", [("heads", "kv_heads"), tuple(AXES.names())], ids=["two", "all"])
def test_axes_go_together_in_the_order_of_the_registry(model_type, kinds, families, tmp_path):
    import torch

    model = families.tiny(model_type, tie_word_embeddings=True)
    shape = shape_from_config(model.config.to_dict())
    axes = [axis_of(kind, shape, drop=(2,)) for kind in kinds if kind in HAS[model_type]]
    keeps = [choose(axis, shape, model) for axis in axes]
    planned = shape
    for axis, keep in zip(axes, keeps, strict=True):
        axis.cut(model, architecture_of(model_type), keep)
        planned = axis.write(planned, axis.target(shape))
    found = shape_from_config(model.config.to_dict())
    assert found.parameters == model.num_parameters()
    assert planned.changes(found).keys() <= {"window_layers", "dense_layers"}
    save_model(model, tmp_path, tokenizer_from=tmp_path)
    loaded = load_model(tmp_path)
    torch.testing.assert_close(families.logits(loaded), families.logits(model))
    loaded.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("kept", [[0, 2], [1, 3], [3]], ids=str)
@pytest.mark.parametrize("model_type", HAS)
def test_settings_of_single_layers_go_with_their_layer(model_type, kept, families, tmp_path):
    import torch

    model = families.tiny(model_type)
    architecture_of(model_type).keep_layers(model, kept)
    save_model(model, tmp_path, tokenizer_from=tmp_path)
    loaded = load_model(tmp_path)
    torch.testing.assert_close(families.logits(loaded), families.logits(model))
    assert len(architecture_of(model_type).layers(loaded)) == len(kept)
    shape = shape_from_config(loaded.config.to_dict())
    assert shape.parameters == loaded.num_parameters()


@pytest.mark.parametrize("model_type", HAS)
def test_an_axis_that_a_family_lacks_is_named_with_the_reason_and_the_others(model_type, families):
    shape = shape_from_config(families.tiny(model_type).config.to_dict())
    architecture = architecture_of(model_type)
    for kind in (*MIXTURE, "ffn"):
        if kind in HAS[model_type]:
            architecture.check_axis(kind, shape)
            continue
        with pytest.raises(ModelError, match=f"axis {kind!r}: a {model_type} model") as caught:
            architecture.check_axis(kind, shape)
        assert caught.value.hint.startswith("it has ")
        assert set(HAS[model_type]) <= set(caught.value.hint[7:].split(", "))
        assert len(str(caught.value).splitlines()) == 2


def test_every_family_is_tried():
    assert sorted(HAS) == sorted(ARCHITECTURES.names())
