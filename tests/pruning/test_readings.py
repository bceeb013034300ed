"""Refits of what reads the residual stream and of experts, against least squares written out."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from trt_kd.architectures import ARCHITECTURES, architecture_of
from trt_kd.architectures.shape import shape_from_config
from trt_kd.config import validate
from trt_kd.errors import ConfigError
from trt_kd.pruning.readings import expert_readings, linear_readings, stream_readings
from trt_kd.pruning.reconstruction import Reconstruct
from trt_kd.pruning.ridge import PLAIN, solve
from trt_kd.pruning.scoring import read
from trt_kd.stages.cutting import prune_model
from trt_kd.stages.prune import PruneConfig, _refit_widths

RIDGE = 1e-3
WITH_HIDDEN = [name for name in ARCHITECTURES.names() if name != "gpt_neox"]


def text(seed=0, sequences=24, length=24):
    return torch.from_numpy(np.random.default_rng(seed).integers(1, 500, (sequences, length)))


def forward_loop(tokens_BL):
    def run(model):
        for part in tokens_BL.split(5):
            model.base_model(input_ids=part, use_cache=False)

    return run


def shown(readings, model):
    """Readings that saw some text."""
    for reading in readings:
        reading.start(Reconstruct(accumulation="float64").gram)
    read(model, forward_loop(text()), readings)
    return readings


def lstsq(goal_TH, inputs_TK, plain_HK, mean):
    """Ridge regression as an augmented least-squares problem, in float64."""
    damping = (RIDGE * mean) ** 0.5
    rows = torch.cat([inputs_TK, damping * torch.eye(inputs_TK.shape[1], dtype=torch.float64)])
    wanted = torch.cat([goal_TH, damping * plain_HK.T])
    return torch.linalg.lstsq(rows, wanted).solution.T


def pruned_norm(norm, x_TN, keep_K, offset):
    """What a norm over the kept channels alone makes of them, its weight grown by sqrt(N/K)."""
    kept_TK = x_TN[:, keep_K]
    scale = (x_TN.shape[1] / len(keep_K)) ** 0.5
    weight_K = (norm.weight.double()[keep_K] + offset) * scale
    eps = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", 1e-6)
    return weight_K * kept_TK / (kept_TK.square().mean(-1, keepdim=True) + eps).sqrt()


def entering(model, module):
    """Inputs of a module over the text, ``[T, ...]`` in float64."""
    found = []
    handle = module.register_forward_pre_hook(
        lambda _, inputs, named: found.append(inputs[0] if inputs else named["hidden_states"]),
        with_kwargs=True,
    )
    with torch.no_grad():
        forward_loop(text())(model)
    handle.remove()
    return torch.cat([each.flatten(0, 1) for each in found]).double()


@pytest.fixture
def one_ridge(monkeypatch):
    """The solution for one ridge from all tokens, no choice among others."""

    def solution(weight_HC, gram, keep_K, ridges):
        return solve(weight_HC, gram.halves, keep_K, *ridges)

    monkeypatch.setattr("trt_kd.pruning.readings.refit", solution)


@pytest.mark.usefixtures("one_ridge")
@pytest.mark.parametrize("model_type", WITH_HIDDEN)
def test_readers_of_the_stream_solve_the_least_squares_problem(model_type, families):
    model = families.tiny(model_type, tie_word_embeddings=False)
    architecture = architecture_of(model_type)
    keep_K, drop_D = torch.arange(0, 64, 2), torch.arange(1, 64, 2)
    readings = shown(stream_readings(model, architecture, keep_K), model)
    assert len(readings) == 2 * 4 + 1
    expected = []
    for reading in (*readings[:4], readings[-1]):  # two layers and the head
        norm, block = reading.readers.norm, reading.readers.block
        if norm is None:
            made_TN = entering(model, block)
            inputs_TK, extra = made_TN[:, keep_K], made_TN[:, :0]
        else:
            x_TN = entering(model, norm)
            made_TN = norm(x_TN.float()).detach().double()
            inputs_TK = pruned_norm(norm, x_TN, keep_K, architecture.norm_offset)
            extra = made_TN[:, keep_K] - inputs_TK
        every = torch.cat([inputs_TK, made_TN[:, drop_D], extra], dim=1)
        mean = every.square().sum(0).mean()
        for entry in (each for entries in reading.readers.weights.values() for each in entries):
            parameter = entry.module.get_parameter(entry.name)
            weight_HN = parameter.detach().flatten(0, -2).double()
            found_HK = lstsq(made_TN @ weight_HN.T, inputs_TK, weight_HN[:, keep_K], mean)
            expected.append((parameter, found_HK))
    for reading in readings:
        reading.solve({}, [RIDGE])
    for parameter, found_HK in expected:
        ours_HK = parameter.detach().flatten(0, -2)[:, keep_K]
        torch.testing.assert_close(ours_HK.double(), found_HK, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("one_ridge")
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_solve_the_least_squares_problem_of_their_own_tokens(model_type, families):
    model, architecture = families.tiny(model_type), architecture_of(model_type)
    block = architecture.experts(architecture.layers(model)[0])
    keep_EK = torch.stack([torch.randperm(block.width)[: block.width // 2].sort().values] * 6)
    flat_N = (keep_EK + block.width * torch.arange(6)[:, None]).flatten()
    mixtures = sum(architecture.experts(layer) is not None for layer in architecture.layers(model))
    readings = expert_readings(model, architecture, [flat_N] * mixtures)
    shown(readings, model)
    inputs_TH = entering(model, block.module).float()
    with torch.no_grad():
        visits = [(w_S.double(), c_SC.double()) for _, w_S, c_SC in block.visits(inputs_TH)]
    expected = []
    for expert, (weights_S, channels_SC) in enumerate(visits):
        weighted_SC = weights_S[:, None] * channels_SC
        down_HC, keep_K = block.down(expert).double(), keep_EK[expert]
        mean = weighted_SC.square().sum(0).mean()
        goal_SH = weighted_SC @ down_HC.T
        expected.append(lstsq(goal_SH, weighted_SC[:, keep_K], down_HC[:, keep_K], mean))
    readings[0].solve({}, [RIDGE])
    for expert, found_HK in enumerate(expected):
        ours_HK = block.down(expert)[:, keep_EK[expert]]
        torch.testing.assert_close(ours_HK.double(), found_HK, rtol=1e-3, atol=1e-4)


def test_an_expert_without_tokens_keeps_the_plain_cut(families):
    model, architecture = families.tiny("mixtral"), architecture_of("mixtral")
    block = architecture.experts(architecture.layers(model)[0])
    keep_N = torch.arange(6 * block.width).view(6, -1)[:, ::2].flatten()
    (reading, *_) = expert_readings(model, architecture, [keep_N] * 4)
    reading.start(Reconstruct().gram)
    for number, gram in enumerate(reading.grams):
        tokens = 0 if number == 2 else 40
        gram.add_some(torch.randn(tokens, block.width), torch.arange(tokens) % 4, 4)
    before_HC = block.down(2).clone()
    found = dict(reading.solve({}, [RIDGE]))
    assert found["experts.2.down_proj"].ridge == PLAIN
    assert torch.equal(block.down(2), before_HC)
    assert reading.grams == []


def test_some_tokens_of_a_batch_go_to_the_halves_of_their_sequences():
    rng = torch.Generator().manual_seed(0)
    batches = [torch.randn(size, 5, 3, generator=rng) for size in (3, 2, 4)]
    whole, some = (Reconstruct(accumulation="float64").gram() for _ in range(2))
    for states_BLC in batches:
        count, length = states_BLC.shape[:2]
        whole.add(states_BLC)
        order = torch.randperm(count * length, generator=rng)
        some.add_some(states_BLC.flatten(0, 1)[order], order // length, count)
    for ours, theirs in zip(some.halves, whole.halves, strict=True):
        torch.testing.assert_close(ours.gram, theirs.gram)


def correlated(model, rank):
    """Let the residual stream live in few dimensions of its channels."""
    hidden = model.config.hidden_size
    basis_RN = torch.linalg.qr(torch.randn(hidden, rank))[0].T
    project_NN = basis_RN.T @ basis_RN
    with torch.no_grad():
        embedding = model.get_input_embeddings()
        embedding.weight.copy_(embedding.weight @ project_NN)
        for layer in model.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight.copy_(project_NN @ writer.weight)


def correlated_experts(model, rank):
    """Let the channels of every expert live in few dimensions: one gate, few directions."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate_up_proj"):
                gate, up = parameter.chunk(2, dim=1)
            elif ".experts." in name and name.endswith(("gate_proj.weight", "up_proj.weight")):
                gate, up = (parameter[None], None) if "gate" in name else (None, parameter[None])
            else:
                continue
            if gate is not None:
                gate.copy_(gate[:, :1].expand_as(gate))
            if up is not None:
                basis, few, rest = torch.linalg.svd(up, full_matrices=False)
                up.copy_(basis[..., :rank] * few[:, None, :rank] @ rest[:, :rank])


def divergence(families, axes, reconstruct, **changes):
    """KL from the unpruned model on unseen text, in nats per token, and what was measured."""
    model = families.tiny(**{"attention_bias": None, "mlp_bias": None, **changes})
    if changes["model_type"] == "llama":
        correlated(model, rank=24)
    else:
        correlated_experts(model, rank=6)

    def log_probabilities():
        with torch.no_grad():
            return model(input_ids=text(seed=1), use_cache=False).logits.log_softmax(-1)

    before = log_probabilities()
    config = PruneConfig.model_validate({"axes": axes, "reconstruct": reconstruct})
    measured = prune_model(config, model, text(sequences=48).numpy())
    nats = F.kl_div(log_probabilities(), before, reduction="none", log_target=True).sum(-1)
    return float(nats.mean()), measured


HIDDEN = {"kind": "hidden", "size": 32, "multiple_of": 8}


@pytest.mark.parametrize("tied", [True, False])
def test_a_refit_of_the_readers_brings_the_model_nearer(families, tied):
    settings = {"model_type": "llama", "tie_word_embeddings": tied}
    plain, nothing = divergence(families, [HIDDEN], None, **settings)
    refitted, measured = divergence(families, [HIDDEN], {}, **settings)
    assert refitted < 0.7 * plain
    assert "refits" not in nothing
    named = [(each["layer"], each["projection"]) for each in measured["refits"]]
    layers = [(n, name) for n in range(4) for name in ("qkv_proj", "gate_up_proj")]
    assert named == layers + ([] if tied else [(None, "lm_head")])


def test_a_refit_of_experts_brings_the_model_nearer(families):
    axes = [{"kind": "expert_ffn", "size": 16, "multiple_of": 8}]
    settings = {"model_type": "qwen3_moe", "norm_topk_prob": True}
    plain, _ = divergence(families, axes, None, **settings)
    refitted, measured = divergence(families, axes, {}, **settings)
    assert refitted < plain
    assert {each["projection"] for each in measured["refits"]} == {
        f"experts.{n}.down_proj" for n in range(6)
    }


@pytest.mark.parametrize("model_type", WITH_HIDDEN)
def test_no_refit_loses_more_than_the_plain_cut_on_what_it_was_fitted_to(model_type, families):
    shape = shape_from_config(families.tiny(model_type).config.to_dict())
    lacking = architecture_of(model_type).axes(shape)
    kinds = [kind for kind in ("hidden", "expert_ffn", "ffn", "heads") if not lacking[kind]]
    axes = [families.halved(kind, shape).model_dump() for kind in kinds]
    model = families.tiny(model_type, tie_word_embeddings=False)
    config = PruneConfig.model_validate({"axes": axes})
    measured = prune_model(config, model, text().numpy())
    assert {each["layer"] for each in measured["refits"]} == {0, 1, 2, 3, None}
    for each in measured["refits"]:
        assert each["residual"] <= each["plain_residual"] * (1 + 1e-6)
        assert (each["ridge"] is None) == (each["residual"] == each["plain_residual"])


def test_one_reading_at_a_time_gives_the_same_model(families):
    """What is refit already must not show in the matrices of what is still to be refit."""
    found = []
    for memory_gib in (1e-9, 1.0):
        axes = [HIDDEN, {"kind": "ffn", "size": 64}, {"kind": "depth", "drop": [1]}]
        found.append(divergence(families, axes, {"memory_gib": memory_gib}, model_type="llama"))
    assert found[0][0] == found[1][0]
    assert found[0][1]["refits"] == found[1][1]["refits"]


@pytest.mark.parametrize("model_type", WITH_HIDDEN)
def test_the_plan_knows_the_size_of_every_matrix(model_type, families):
    model, architecture = families.tiny(model_type), architecture_of(model_type)
    shape = shape_from_config(model.config.to_dict())
    cut = {
        kind: 32 for kind in ("hidden", "ffn", "expert_ffn") if not architecture.axes(shape)[kind]
    }
    planned = _refit_widths(shape, cut)
    readings = stream_readings(model, architecture, torch.arange(32))
    layers = architecture.layers(model)
    mlps = [mlp.down for mlp in map(architecture.mlp, layers) if mlp is not None]
    readings += linear_readings(model, architecture, mlps)
    if "expert_ffn" in cut:
        keep_N = torch.arange(shape.experts * shape.expert_ffn)
        readings += expert_readings(model, architecture, [keep_N] * shape.expert_layers)
    found = sorted(reading.width for reading in readings)
    if model_type in ("qwen3_moe", "olmo2"):  # layers of two kinds; no norms in front
        assert sum(found) <= sum(planned)
        assert max(found) <= max(planned)
    else:
        assert found == sorted(planned)


def test_a_schedule_that_hidden_does_not_go_with_is_refused():
    settings = {"axes": [HIDDEN], "reconstruct": {"schedule": "sequential"}}
    with pytest.raises(ConfigError, match="sequential does not go with hidden"):
        validate(PruneConfig, settings, where="recipe")
