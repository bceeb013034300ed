"""Laws of every registered importance, and each one against its definition."""

import copy
from functools import partial

import numpy as np
import pytest
import torch

from trt_kd.architectures import architecture_of
from trt_kd.architectures.shape import shape_from_config
from trt_kd.errors import ModelError
from trt_kd.pruning import AXES, IMPORTANCE
from trt_kd.pruning.base import WidthAxis
from trt_kd.pruning.engine import Request, shrink
from trt_kd.pruning.scoring import Layers, record

LAYERS = [name for name in IMPORTANCE.names() if "layers" in IMPORTANCE.load(name).units]
CHANNELS = [name for name in IMPORTANCE.names() if "channels" in IMPORTANCE.load(name).units]
AGGREGATES = [(s, b) for s in ("mean", "l2", "max") for b in ("l2", "mean", "max")]


def trunk(batches, model):
    for batch in batches:
        model.base_model(input_ids=torch.from_numpy(batch), use_cache=False)


def width_axes(model):
    """Every width axis that the model has, by kind, at half its size."""
    shape = shape_from_config(model.config.to_dict())
    reasons = architecture_of(model.config.model_type).axes(shape)
    kinds = [kind for kind in AXES.names() if not reasons[kind] and kind != "vocab"]
    axes = [AXES.load(kind)(**{"multiple_of": 1} if kind != "depth" else {}) for kind in kinds]
    return {axis.kind: axis for axis in axes if isinstance(axis, WidthAxis)}


def scored(model, batches, channels=None, layers=None, run_length=1):
    """The scores of all width axes by ``channels`` and of the layers by ``layers``."""
    architecture = architecture_of(model.config.model_type)
    axes = width_axes(model) if channels else {}
    recording = record(
        model,
        architecture,
        partial(trunk, batches),
        channels={k: (channels, a.places(model, architecture)) for k, a in axes.items()},
        layers=Layers(layers, run_length) if layers else None,
        readings=(),
    )

    def final(importance, total):
        return importance.scores(total, torch.Generator().manual_seed(0)).numpy()

    found = {
        kind: [[final(channels, total) for total in totals] for totals in places]
        for kind, places in recording.channels.items()
    }
    return found, [final(layers, total) for total in recording.runs]


def loss(model, blocks):
    """Next-token loss in nats summed over blocks, written out in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(blocks), use_cache=False).logits.double()
    log_p = logits[:, :-1] - logits[:, :-1].exp().sum(-1, keepdim=True).log()
    return -float(log_p.gather(-1, torch.from_numpy(blocks)[:, 1:, None]).sum())


@pytest.fixture(params=["llama", "qwen3_moe"])
def decoder(request, make_decoder):
    """A decoder, and one with experts in all layers but one."""
    return make_decoder(request.param, num_hidden_layers=4)


# Laws


@pytest.mark.parametrize("name", CHANNELS)
def test_scores_of_channels_have_the_shape_of_the_units(name, decoder, blocks):
    found, _ = scored(decoder, [blocks[:4], blocks[4:]], channels=IMPORTANCE.load(name)())
    architecture = architecture_of(decoder.config.model_type)
    shape = shape_from_config(decoder.config.to_dict())
    units = {"heads": shape.heads, "expert_ffn": shape.experts * shape.expert_ffn}
    assert set(found) >= {"ffn", "heads", "kv_heads", "hidden"}
    assert ("experts" in found) == (decoder.config.model_type == "qwen3_moe")
    for kind, axis in width_axes(decoder).items():
        places = axis.places(decoder, architecture)
        assert [len(sites) for sites in found[kind]] == [len(place.sites) for place in places]
        count = units.get(kind, axis.read(shape))
        assert {scores.shape for sites in found[kind] for scores in sites} == {(count,)}


@pytest.mark.parametrize("run_length", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_every_run_of_layers_has_one_score(name, run_length, decoder, blocks):
    _, runs = scored(decoder, [blocks], layers=IMPORTANCE.load(name)(), run_length=run_length)
    assert [score.shape for score in runs] == [()] * (4 - run_length + 1)


def close(one, other):
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * np.abs(other).max())


@pytest.mark.parametrize("name", CHANNELS)
def test_the_order_of_batches_does_not_change_scores_of_channels(name, decoder, blocks):
    batches = [blocks[:2], blocks[2:3], blocks[3:]]
    one, other = (
        scored(decoder, order, channels=IMPORTANCE.load(name)())[0]
        for order in (batches, batches[::-1])
    )
    for kind in one:
        close(np.array(one[kind]), np.array(other[kind]))


@pytest.mark.parametrize("name", LAYERS)
def test_the_order_of_batches_does_not_change_scores_of_layers(name, decoder, blocks):
    batches = [blocks[:2], blocks[2:3], blocks[3:]]
    one, other = (
        scored(decoder, order, layers=IMPORTANCE.load(name)(), run_length=2)[1]
        for order in (batches, batches[::-1])
    )
    close(np.array(one), np.array(other))


@pytest.mark.parametrize("name", IMPORTANCE.names())
def test_activations_that_are_not_finite_are_an_error(name, decoder, blocks):
    with torch.no_grad():
        decoder.model.layers[2].self_attn.o_proj.weight[5] = float("nan")
    role = "channels" if name in CHANNELS else "layers"
    with pytest.raises(ModelError, match="not finite"):
        scored(decoder, [blocks], **{role: IMPORTANCE.load(name)()})


@pytest.mark.parametrize("name", IMPORTANCE.names())
def test_scoring_leaves_the_model_as_it_was(name, decoder, blocks):
    before = {key: value.clone() for key, value in decoder.state_dict().items()}
    decoder.model.layers[0].self_attn.o_proj.weight.requires_grad_(False)
    wanted = [parameter.requires_grad for parameter in decoder.parameters()]
    decoder.train()
    role = "channels" if name in CHANNELS else "layers"
    scored(decoder, [blocks], **{role: IMPORTANCE.load(name)()})
    assert decoder.training
    assert [parameter.requires_grad for parameter in decoder.parameters()] == wanted
    assert all(parameter.grad is None for parameter in decoder.parameters())
    assert not [m for m in decoder.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not [m for m in decoder.modules() if "forward" in vars(m)]
    assert all(torch.equal(before[key], value) for key, value in decoder.state_dict().items())


@pytest.mark.parametrize("name", IMPORTANCE.names())
def test_every_importance_prunes(name, make_decoder, blocks):
    model = make_decoder(num_hidden_layers=4)
    importance = IMPORTANCE.load(name)()
    if name in LAYERS:
        axes = [AXES.load("depth")(layers=2, importance=importance)]
    else:
        axes = [AXES.load("ffn")(size=128), AXES.load("hidden")(size=64)]
    channels = importance if name in CHANNELS else IMPORTANCE.load("activation")()
    request = Request(axes=axes, importance=channels, reconstruct=None, seed=0)
    shape = shape_from_config(model.config.to_dict())
    shrink(model, partial(trunk, [blocks]), request, shape)
    after = shape_from_config(model.config.to_dict())
    sizes = (after.layers, after.ffn, after.hidden)
    assert sizes == ((2, 256, 128) if name in LAYERS else (4, 128, 64))


# Activation


@pytest.mark.parametrize(("over_sequence", "over_batch"), AGGREGATES)
def test_an_activations_score_is_its_closed_form(over_sequence, over_batch):
    x_BLC = np.random.default_rng(0).normal(size=(5, 7, 3))
    importance = IMPORTANCE.load("activation")(over_sequence=over_sequence, over_batch=over_batch)
    total = torch.zeros(())
    for part in (x_BLC[:2], x_BLC[2:]):
        total = importance.combined(total, importance.contribution(torch.from_numpy(part)))
    size_BC = {
        "mean": np.abs(x_BLC).mean(axis=1),
        "l2": np.linalg.norm(x_BLC, axis=1),
        "max": np.abs(x_BLC).max(axis=1),
    }[over_sequence]
    expected = {
        "l2": np.linalg.norm(size_BC, axis=0),
        "mean": 5 * size_BC.mean(axis=0),  # a sum, which ranks as the mean does
        "max": size_BC.max(axis=0),
    }[over_batch]
    scores = importance.scores(total, torch.Generator()).numpy()
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_minitrons_best_aggregates_are_the_default():
    importance = IMPORTANCE.load("activation")()
    assert (importance.over_sequence, importance.over_batch) == ("mean", "l2")


def test_block_influence_of_states_of_any_size_is_their_angle():
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(2, 3, 5, 8)) * np.array([1e-3, 1e5])[:, None, None, None]
    lengths = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
    expected = (1.0 - (before * after).sum(-1) / lengths).sum()
    states = (torch.from_numpy(before), torch.from_numpy(after))
    assert float(IMPORTANCE.load("block_influence")().contribution(*states)) == pytest.approx(
        expected, rel=1e-5
    )


# Taylor


def shrunk_loss(model, blocks, columns, share):
    """Loss after the columns of some weights are scaled by 1 - share: what reads the units."""
    with torch.no_grad():
        saved = [weight.clone() for weight, _ in columns]
        for weight, index in columns:
            weight[..., index] *= 1.0 - share
        found = loss(model, blocks)
        for (weight, _), old in zip(columns, saved, strict=True):
            weight.copy_(old)
    return found


def slope(model, blocks, columns, share=1e-2):
    """Size of the loss's derivative by the share that is taken from the units."""
    ends = [shrunk_loss(model, blocks, columns, sign * share) for sign in (1, -1)]
    return abs(ends[0] - ends[1]) / (2 * share)


@pytest.mark.parametrize("kind", ["ffn", "heads", "kv_heads"])
def test_taylor_is_the_slope_of_the_loss_as_a_unit_fades(kind, make_decoder, blocks):
    model = make_decoder(num_hidden_layers=2).double()
    found, _ = scored(model, [blocks[:2], blocks[2:]], channels=IMPORTANCE.load("taylor")())
    layer = model.model.layers[1]
    weight = layer.mlp.down_proj.weight if kind == "ffn" else layer.self_attn.o_proj.weight
    (scores,) = found[kind][1]
    width = weight.shape[1] // len(scores)
    for unit in (*scores.argsort()[-3:], 0):
        columns = [(weight, slice(unit * width, (unit + 1) * width))]
        assert scores[unit] == pytest.approx(slope(model, blocks, columns), rel=1e-2, abs=0.02)


def test_taylor_of_a_hidden_channel_is_the_slope_as_a_norm_fades(make_decoder, blocks):
    model = make_decoder(num_hidden_layers=2).double()
    found, _ = scored(model, [blocks], channels=IMPORTANCE.load("taylor")())
    for site, name in enumerate(("input_layernorm", "post_attention_layernorm")):
        weight = model.model.layers[0].get_submodule(name).weight
        scores = found["hidden"][0][site]
        for unit in (*scores.argsort()[-2:], 0):
            expected = slope(model, blocks, [(weight, slice(unit, unit + 1))])
            assert scores[unit] == pytest.approx(expected, rel=1e-2, abs=0.02)


@pytest.mark.parametrize("kind", ["experts", "expert_ffn"])
def test_taylor_of_experts_is_the_slope_as_they_fade(kind, make_decoder, blocks):
    """In the last layer: what is routed elsewhere behind another one is no slope."""
    model = make_decoder("qwen3_moe", num_hidden_layers=2, mlp_only_layers=[])
    found, _ = scored(model, [blocks[:2], blocks[2:]], channels=IMPORTANCE.load("taylor")())
    architecture = architecture_of("qwen3_moe")
    experts = architecture.experts(architecture.layers(model)[1])
    fused = hasattr(experts, "store")
    (scores,) = found[kind][1]
    best = scores.argsort()[-3:]
    for unit in (*best, 0):
        expert = unit if kind == "experts" else unit // experts.width
        down = experts.store.down_proj[expert] if fused else experts._linears(expert)[2].weight
        channel = unit % experts.width
        columns = slice(None) if kind == "experts" else slice(channel, channel + 1)
        expected = slope(model, blocks, [(down, columns)])
        assert scores[unit] == pytest.approx(expected, rel=0.02, abs=0.05)
    assert scores[best].min() > 0.5


@pytest.mark.parametrize("run_length", [1, 2])
def test_taylor_of_layers_is_the_slope_as_what_they_add_fades(run_length, make_decoder, blocks):
    """The added part is scaled by a hook on the last layer of the run."""
    model = make_decoder(num_hidden_layers=3).double()
    importance = IMPORTANCE.load("taylor")()
    _, runs = scored(model, [blocks], layers=importance, run_length=run_length)
    for first, score in enumerate(runs):
        layers, seen = model.model.layers, []

        def fade(module, inputs, output, share=0.0, seen=seen):
            out = output[0] if isinstance(output, tuple) else output
            mixed = out - share * (out - seen[-1])
            return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

        enter = layers[first].register_forward_pre_hook(
            lambda _, inputs, named, seen=seen: seen.append(
                inputs[0] if inputs else named["hidden_states"]
            ),
            with_kwargs=True,
        )
        ends = []
        for share in (1e-2, -1e-2):
            leave = layers[first + run_length - 1].register_forward_hook(partial(fade, share=share))
            ends.append(loss(model, blocks))
            leave.remove()
        enter.remove()
        assert float(score) == pytest.approx(abs(ends[0] - ends[1]) / 2e-2, rel=1e-2)


# Perplexity


FAMILIES = ("llama", "gpt_neox", "gemma2", "qwen3_moe", "smollm3")


@pytest.mark.parametrize("run_length", [1, 2])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_perplexity_is_the_loss_of_a_copy_without_the_layers(
    model_type, run_length, families, blocks
):
    model = families.tiny(model_type)
    importance = IMPORTANCE.load("perplexity")(blocks=6)
    _, runs = scored(model, [blocks[:4], blocks[4:]], layers=importance, run_length=run_length)
    tokens = blocks[:, 1:].size
    whole = loss(model, blocks) / tokens
    for first, score in enumerate(runs):
        cut = copy.deepcopy(model)
        skipped = range(first, first + run_length)
        kept = [n for n in range(4) if n not in skipped]
        architecture_of(model_type).keep_layers(cut, kept)
        assert float(score) == pytest.approx(loss(cut, blocks) / tokens - whole, abs=2e-5)
    assert len(runs) == 5 - run_length


def test_a_layer_that_does_nothing_costs_no_perplexity(make_decoder, blocks):
    model = make_decoder(num_hidden_layers=4)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    _, runs = scored(model, [blocks], layers=IMPORTANCE.load("perplexity")())
    assert runs[2] == pytest.approx(0.0, abs=1e-6)
    assert min(abs(runs[n]) for n in (0, 1, 3)) > 1e-3


def test_perplexity_is_measured_on_no_more_blocks_than_asked(make_decoder, blocks, monkeypatch):
    model = make_decoder(num_hidden_layers=4)
    heads = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0].shape))
    scored(model, [blocks], layers=IMPORTANCE.load("perplexity")(blocks=2))
    assert [shape[0] for shape in heads] == [1] * 2 * (1 + 4)


def test_layers_before_the_skipped_one_are_not_run_again(make_decoder, blocks):
    model = make_decoder(num_hidden_layers=4)
    runs = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: runs.append(index))
    scored(model, [blocks[:1]], layers=IMPORTANCE.load("perplexity")())
    # One scoring pass, one whole pass, and of the passes without layer n those after n.
    assert [runs.count(index) for index in range(4)] == [2, 3, 4, 5]


# The loss


@pytest.mark.parametrize("name", ["taylor", "perplexity"])
def test_padding_is_neither_read_nor_predicted(name, make_decoder, blocks):
    model = make_decoder(num_hidden_layers=3)
    importance = IMPORTANCE.load(name)()
    mask = np.ones_like(blocks[:1])
    mask[:, 20:] = 0

    def padded(filler):
        tokens = np.where(mask, blocks[:1], filler)

        def loop(model):
            inputs, attention_mask = torch.from_numpy(tokens), torch.from_numpy(mask)
            model(input_ids=inputs, attention_mask=attention_mask, use_cache=False)

        return record(
            model,
            architecture_of("llama"),
            loop,
            channels={},
            layers=Layers(importance, 1),
            readings=(),
        ).runs

    torch.testing.assert_close(padded(3), padded(400), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["taylor", "perplexity"])
def test_blocks_of_one_token_are_an_error(name, make_decoder, blocks):
    with pytest.raises(ModelError, match="no next token"):
        scored(make_decoder(), [blocks[:, :1]], layers=IMPORTANCE.load(name)())


@pytest.mark.parametrize("name", IMPORTANCE.names())
def test_a_loop_that_feeds_embeddings_suits_all_but_the_loss(name, make_decoder, blocks):
    model = make_decoder(num_hidden_layers=2)
    importance = IMPORTANCE.load(name)()
    if "layers" not in importance.units:
        return

    def loop(model):
        embeddings = model.model.embed_tokens(torch.from_numpy(blocks))
        model.base_model(inputs_embeds=embeddings, use_cache=False)

    settings = {"channels": {}, "layers": Layers(importance, 1), "readings": ()}
    if importance.evidence == "states":
        assert len(record(model, architecture_of("llama"), loop, **settings).runs) == 2
    else:
        with pytest.raises(ModelError, match="no token ids"):
            record(model, architecture_of("llama"), loop, **settings)


def test_layers_named_to_be_dropped_are_not_scored(make_decoder, blocks):
    model = make_decoder(num_hidden_layers=4)
    passes = []
    model.lm_head.register_forward_hook(lambda *_: passes.append(1))
    axis = AXES.load("depth")(drop=[1], importance=IMPORTANCE.load("perplexity")())
    request = Request(
        axes=[axis], importance=IMPORTANCE.load("activation")(), reconstruct=None, seed=0
    )
    shape = shape_from_config(model.config.to_dict())
    measured = shrink(model, partial(trunk, [blocks]), request, shape)
    assert measured["kept_layers"] == [0, 2, 3]
    assert passes == []


@pytest.mark.parametrize("name", CHANNELS)
def test_a_total_is_added_to_where_it_lies(name):
    importance = IMPORTANCE.load(name)()
    totals = [torch.zeros(3, dtype=torch.float64)]
    before, batches = totals[0], torch.rand(2, 3, dtype=torch.float64)
    for contribution in batches:
        importance.accumulate(totals, 0, contribution)
    once = importance.combined(importance.combined(torch.zeros(3), batches[0]), batches[1])
    assert totals[0] is before
    assert torch.equal(before, once)
