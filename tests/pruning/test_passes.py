"""The memory of the passes, counted ahead, holds what torch's allocator hands out."""

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from trt_kd.architectures import architecture_of
from trt_kd.architectures.shape import shape_from_config
from trt_kd.pruning import AXES, IMPORTANCE
from trt_kd.pruning.passes import pass_bytes
from trt_kd.pruning.scoring import Layers, record
from trt_kd.stages.prune import PruneConfig

BATCH, TOKENS = 4, 64
KINDS = ("ffn", "heads", "kv_heads", "hidden", "experts", "expert_ffn")


def peak_bytes(run):
    """Most bytes that were allocated at once, counted by the allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = recorded.profiler.kineto_results.events()
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = most = 0
    for _, count in memory:
        held += count
        most = max(most, held)
    return most


MODELS = [
    ("llama", {}),
    ("llama", {"vocab_size": 8192, "num_hidden_layers": 2}),
    ("llama", {"intermediate_size": 512, "num_hidden_layers": 2}),
    ("gemma2", {}),
]
PASSES = [(*model, name) for model in MODELS for name in ("activation", "taylor", "perplexity")]


@pytest.mark.parametrize(
    ("model_type", "changes", "name"), [*PASSES, ("qwen3_moe", {"num_hidden_layers": 2}, "taylor")]
)
def test_a_pass_takes_no_more_than_predicted_and_not_much_less(model_type, changes, name, families):
    model = families.tiny(model_type, **changes)
    architecture = architecture_of(model_type)
    shape = shape_from_config(model.config.to_dict())
    importance = IMPORTANCE.load(name)()
    lacking = architecture.axes(shape)
    axes = {kind: AXES.load(kind)() for kind in KINDS if not lacking[kind]}
    places = {kind: (importance, axis.places(model, architecture)) for kind, axis in axes.items()}
    layers = importance if "layers" in importance.units else IMPORTANCE.load("block_influence")()
    tokens = torch.randint(1, 500, (2, BATCH, TOKENS), generator=torch.Generator().manual_seed(0))

    def run():
        record(
            model,
            architecture,
            lambda model: [model.base_model(input_ids=batch, use_cache=False) for batch in tokens],
            channels=places if "channels" in importance.units else {},
            layers=Layers(layers, 1),
            readings=(),
        )

    measured = peak_bytes(run)
    evidence = {"states", importance.evidence}
    predicted = max(pass_bytes(shape, e, batch=BATCH, tokens=TOKENS) for e in evidence)
    assert measured <= predicted <= 3 * measured


def test_gradients_cost_more_than_states_and_losses_follow_one_sequence(families):
    shape = shape_from_config(families.tiny("llama").config.to_dict())
    states, gradients = (
        pass_bytes(shape, evidence, batch=BATCH, tokens=TOKENS)
        for evidence in ("states", "gradients")
    )
    assert gradients > states
    losses = {pass_bytes(shape, "losses", batch=batch, tokens=TOKENS) for batch in (1, 4, 16)}
    assert len(losses) == 1
    wide = replace(shape, vocab=100 * shape.vocab)
    assert pass_bytes(wide, "losses", batch=1, tokens=TOKENS) > max(losses)
    assert pass_bytes(wide, "states", batch=BATCH, tokens=TOKENS) == states


def test_the_plan_counts_the_pass_that_the_importance_asks_for(families):
    shape = shape_from_config(families.tiny("llama", vocab_size=32_000).config.to_dict())
    depth = {"kind": "depth", "layers": 1}
    ffn = {"kind": "ffn", "size": 64}

    def planned(**settings):
        return PruneConfig.model_validate({"axes": [ffn], **settings}).memory_bytes(shape)

    assert planned(importance="taylor") > planned()
    assert planned(axes=[depth | {"importance": "perplexity"}]) > planned(axes=[depth])
    named = {"kind": "depth", "drop": [1], "importance": "perplexity"}
    assert planned(axes=[named]) == planned(axes=[{"kind": "depth", "drop": [1]}])
