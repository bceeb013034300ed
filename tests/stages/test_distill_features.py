"""Distillation with losses between layers: what is learnt, logged, kept, resumed and refused."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from torch.nn import functional as F

from trt_kd.artifacts import work_directory
from trt_kd.checkpoints import load_model, load_tokenizer
from trt_kd.data.base import token_blocks
from trt_kd.errors import ConfigError
from trt_kd.losses import FEATURE_LOSSES
from trt_kd.stages.distill import DistillConfig, distill

STEPS = 4


@pytest.fixture(scope="module")
def made(make_student):
    """A checkpoint artifact of a random model."""
    return lambda seed, metrics=(), **sizes: make_student(0.0, metrics=metrics, seed=seed, **sizes)


@pytest.fixture(scope="module")
def big(made):
    return made(1, num_hidden_layers=3, hidden_size=32, intermediate_size=32)


@pytest.fixture(scope="module")
def small(made):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    return made(2, {"kept_layers": [0, 2]}, num_hidden_layers=2, num_key_value_heads=1, **sizes)


@pytest.fixture(scope="module")
def slim(made):
    """As wide as the teacher, less deep."""
    return made(3, {"kept_layers": [0, 2]}, num_hidden_layers=2, hidden_size=32,
                intermediate_size=32)  # fmt: skip


@pytest.fixture(scope="module")
def settings(make_settings):
    return make_settings(data={"block_tokens": 16}, learning_rate=1e-2)


@pytest.fixture(scope="module")
def roles(small, big):
    return {"student": small, "teacher": big}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, settings, roles):
    """A run with every kind of state that nothing interrupted."""
    return distill(settings(*STATEFUL), **roles, out=tmp_path_factory.mktemp("whole") / "out")


def first_batch(config, artifact, count=2):
    blocks = token_blocks(
        config.data, load_tokenizer(artifact.path), split="train", count=count, seed=config.seed
    )
    return torch.from_numpy(np.array(blocks))


# --- when it joins ------------------------------------------------------------------------------


def escalating(settings, gap):
    feature = {"loss": "mse", "pairs": [[0, 0]], "projector": "linear"}
    monitor = {"every_steps": 2, "blocks": 1, "skip_blocks": 0}
    wanted = {"after_steps": 2, "gap_nats": gap}
    return settings(feature, features_if=wanted, monitor=monitor, steps=5, learning_rate=1e-4)


@pytest.fixture(scope="module")
def joined(settings, roles, tmp_path_factory):
    out = tmp_path_factory.mktemp("joined") / "out"
    return distill(escalating(settings, 1e-6), **roles, out=out)


def test_features_join_after_the_step_only_where_a_gap_remains(
    settings, roles, joined, tmp_path, log_of, weights_of
):
    found = [any(name.startswith("feature_") for name in row) for row in log_of(joined)]
    assert found == [False, False, True, True, True]
    enough = distill(escalating(settings, 1e6), **roles, out=tmp_path / "enough")
    plain = distill(settings(steps=5, learning_rate=1e-4), **roles, out=tmp_path / "plain")
    assert log_of(enough) == log_of(plain)
    assert log_of(joined)[:2] == log_of(plain)[:2]
    torch.testing.assert_close(weights_of(enough), weights_of(plain), rtol=0, atol=0)


@pytest.fixture
def run(settings, roles, tmp_path):
    return partial(distill, escalating(settings, 1e-6), **roles, out=tmp_path / "out")


@pytest.mark.parametrize("step", [3, 5])
def test_what_was_decided_outlives_a_cut(run, joined, step, assert_same_run, cut_off):
    cut_off(run, step)
    assert_same_run(run(), joined)


@pytest.mark.parametrize(
    ("feature", "changes", "message"),
    [
        (None, {}, "features_if: no effect: there are no features"),
        ({}, {"response_weight": 0, "task_weight": 1}, "response_weight is 0"),
        ({}, {"steps": 2}, "after_steps 2 must be below steps 2"),
        ({}, {"monitor": None}, "leave monitor: null out"),
        ({}, {"monitor": {"every_steps": 3}}, "step 2 is not measured"),
        ({"alone": True, "until_step": 3}, {}, "leave alone out"),
        ({"until_step": 2}, {}, "a feature ends before step 2"),
    ],
)
def test_a_decision_that_cannot_be_made_is_refused(settings, feature, changes, message):
    plain = {"monitor": {"every_steps": 1}, "features_if": {"after_steps": 2, "gap_nats": 0.1}}
    features = [] if feature is None else [{"loss": "gram", **feature}]
    with pytest.raises(ValidationError, match=message):
        settings(*features, **plain | changes)


# --- what it learns -----------------------------------------------------------------------------


def test_every_loss_is_logged_for_each_pair_and_weighted(
    settings, made, big, tmp_path, log_of, weights_of
):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "head_dim": 8}
    small = made(2, num_hidden_layers=2, **sizes)
    losses = {name: FEATURE_LOSSES.load(name)() for name in FEATURE_LOSSES.names()}
    features = [
        {"loss": {"kind": name} | ({"heads": 4} if loss.attention_heads else {}),
         "pairs": [[0, 1], [1, 2]], "weight": 0.5}
        | ({"projector": "linear"} if loss.same_width else {})
        for name, loss in losses.items()
    ]  # fmt: skip
    trained = distill(settings(*features), student=small, teacher=big, out=tmp_path / "with")
    row = log_of(trained)[-1]
    names = [f"feature_{n}_{p}" for n in FEATURE_LOSSES.names() for p in ("0_1", "1_2")]
    assert names == [key for key in row if key.startswith("feature_")]
    assert all(trained.metrics[key] > 0 for key in names)
    total = row["response_nats_per_token"] + 0.5 * sum(row[key] for key in names)
    assert row["loss_nats_per_token"] == pytest.approx(total, rel=1e-4)
    assert weights_of(trained).keys() == weights_of(small).keys()


def test_the_first_step_logs_the_loss_of_the_untrained_student(
    settings, slim, big, tmp_path, log_of
):
    config = settings({"loss": "mse", "pairs": [[0, 1]]}, {"loss": "cosine", "pairs": [[1, 2]]})
    trained = distill(config, student=slim, teacher=big, out=tmp_path / "out")
    tokens = first_batch(config, slim)
    with torch.no_grad():
        both = [load_model(x.path)(tokens, output_hidden_states=True) for x in (slim, big)]
    hidden = [output.hidden_states for output in both]
    mse = F.mse_loss(hidden[0][1][:, :-1], hidden[1][2][:, :-1]).item()
    assert log_of(trained)[0]["feature_mse_0_1"] == pytest.approx(mse, rel=1e-5)
    # The last hidden states of transformers are behind the final norm, those of a layer are not.
    assert 0 < log_of(trained)[0]["feature_cosine_1_2"] < 2


def test_a_feature_term_alone_brings_the_layers_together(settings, slim, big, tmp_path, log_of):
    feature = {"loss": "mse", "pairs": "kept", "count": 1, "weight": 100.0, "normalise": "batch"}
    config = settings(feature, steps=20, checkpoint_every_steps=20)
    rows = log_of(distill(config, student=slim, teacher=big, out=tmp_path / "out"))
    assert rows[-1]["feature_mse_1_2"] < 0.95 * rows[0]["feature_mse_1_2"]


def test_a_hint_stage_learns_nothing_else_and_ends(settings, slim, big, tmp_path, log_of):
    feature = {"loss": "hint", "pairs": [[0, 0]], "until_step": 2, "alone": True}
    config = settings(feature, checkpoint_every_steps=1, weight_decay=0.0)
    trained = distill(config, student=slim, teacher=big, out=tmp_path / "out")
    rows = log_of(trained)
    assert ["feature_hint_0_0" in row for row in rows] == [True, True, False, False]
    assert rows[0]["loss_nats_per_token"] == pytest.approx(rows[0]["feature_hint_0_0"], rel=1e-5)
    assert rows[3]["loss_nats_per_token"] == rows[3]["response_nats_per_token"]


def test_a_hint_reaches_only_the_layers_below_it(settings, slim, big, tmp_path, weights_of):
    feature = {"loss": "hint", "pairs": [[0, 0]], "until_step": 3, "alone": True}
    config = settings(feature, checkpoint_every_steps=10, weight_decay=0.0)
    # The last step is the response's: a cosine has brought the learning rate near zero by then.
    trained, before = (
        distill(config, student=slim, teacher=big, out=tmp_path / "out"),
        weights_of(slim),
    )
    moved = {k: (v - before[k]).abs().max().item() for k, v in weights_of(trained).items()}
    lower = min(v for k, v in moved.items() if "layers.0" in k and "proj" in k)
    upper = max(v for k, v in moved.items() if "layers.1" in k)
    assert lower > 2 * upper


def test_accumulated_passes_make_the_step_of_one_larger_pass(
    settings, small, big, tmp_path, log_of, weights_of
):
    features = [
        {"loss": {"kind": "crd", "memory": 20}, "pairs": [[1, 2]], "projector": "linear"},
        {"loss": "minilm", "pairs": [[0, 1]]},
        {"loss": "nst", "pairs": [[0, 1]]},
    ]
    whole = distill(settings(*features), student=small, teacher=big, out=tmp_path / "one")
    config = settings(*features, batch_size=1, gradient_accumulation=2)
    parts = distill(config, student=small, teacher=big, out=tmp_path / "two")
    torch.testing.assert_close(weights_of(parts), weights_of(whole), rtol=1e-3, atol=1e-4)
    assert "feature_crd_1_2" not in log_of(whole)[0]
    assert log_of(parts)[1]["feature_crd_1_2"] == pytest.approx(
        log_of(whole)[1]["feature_crd_1_2"], rel=1e-3
    )


def test_minilm_s_first_version_compares_the_attention_of_the_models(
    settings, slim, big, tmp_path, log_of
):
    """Against transformers' own attention probabilities."""
    config = settings({"loss": {"kind": "minilm_v1", "heads": 4}, "pairs": [[1, 2]]}, steps=1)
    row = log_of(distill(config, student=slim, teacher=big, out=tmp_path / "out"))[0]
    tokens, found = first_batch(config, slim), []
    for artifact, layer in ((slim, 1), (big, 2)):
        model = load_model(artifact.path)
        model.set_attn_implementation("eager")
        values = []
        projection = model.model.layers[layer].self_attn.v_proj
        projection.register_forward_hook(lambda _m, _i, output, kept=values: kept.append(output))
        with torch.no_grad():
            attention = model(tokens, output_attentions=True).attentions[layer]
        heads = values[0].unflatten(-1, (-1, 16)).transpose(1, 2).repeat_interleave(2, 1)
        scores = heads @ heads.mT / 4.0
        later = torch.ones(16, 16).triu(1).bool()
        relation = scores.masked_fill(later, -torch.inf).softmax(-1)
        found.append([x[:, :, :-1, :-1] for x in (attention, relation)])
    pairs = zip(*found, strict=True)
    expected = sum(torch.xlogy(p, p).sum() - torch.xlogy(p, q).sum() for q, p in pairs) / (4 * 30)
    assert row["feature_minilm_v1_1_2"] == pytest.approx(expected.item(), rel=1e-3)


def test_a_weight_can_follow_a_schedule(settings, slim, big, tmp_path, log_of):
    weight = {"kind": "linear", "end": 2.0, "steps": 3}
    config = settings({"loss": "mse", "pairs": [[0, 0]], "weight": weight})
    rows = log_of(distill(config, student=slim, teacher=big, out=tmp_path / "out"))
    found = [
        (row["loss_nats_per_token"] - row["response_nats_per_token"]) / row["feature_mse_0_0"]
        for row in rows
    ]
    assert found == pytest.approx([0.0, 1.0, 2.0, 2.0], abs=1e-4)


def test_features_work_beside_hard_labels_without_a_response_term(
    settings, slim, big, tmp_path, log_of
):
    config = settings({"loss": "pkt", "count": 1}, response_weight=0.0, task_weight=1.0)
    rows = log_of(distill(config, student=slim, teacher=big, out=tmp_path / "out"))
    assert "response_nats_per_token" not in rows[0]
    assert rows[0]["feature_pkt_1_1"] > 0


def test_bf16_training_gives_nearly_the_same_features(settings, slim, big, tmp_path, log_of):
    feature = {"loss": "mse", "pairs": "cka", "count": 1}
    rows = [
        log_of(
            distill(
                settings(feature, steps=1, precision=p), student=slim, teacher=big, out=tmp_path / p
            )
        )
        for p in ("fp32", "bf16")
    ]
    (name,) = [key for key in rows[0][0] if key.startswith("feature_")]
    assert rows[1][0][name] == pytest.approx(rows[0][0][name], rel=0.05)


# --- how it survives ----------------------------------------------------------------------------

STATEFUL = [
    {"loss": {"kind": "crd", "memory": 40}, "pairs": [[1, 2]], "projector": "mlp"},
    {"loss": "logsum", "pairs": "cka", "count": 1, "projector": "orthogonal"},
    {"loss": "hint", "pairs": [[0, 1]], "projector": "linear", "until_step": 3},
]


def test_a_run_cut_off_ends_as_if_it_had_not_been(
    whole, settings, roles, tmp_path, monkeypatch, assert_same_run
):
    config = settings(*STATEFUL)
    from trt_kd.training import callbacks

    def cut(self, args, state, control, **_):
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Progress, "on_log", cut)
        with pytest.raises(KeyboardInterrupt):
            distill(config, **roles, out=tmp_path / "out")
    work = work_directory(tmp_path / "out")
    (kept,) = work.glob("checkpoints/checkpoint-*/features.safetensors")
    assert kept.parent.name == "checkpoint-2"
    assert_same_run(distill(config, **roles, out=tmp_path / "out"), whole)
    assert not work.exists()


def test_the_student_holds_stock_weights_only(whole, small, weights_of):
    assert weights_of(whole).keys() == weights_of(small).keys()
    assert whole.metrics["parameters"] == load_model(small.path).num_parameters()
    assert not [name for name in whole.manifest.files if "feature" in name]


def test_projectors_are_trained_without_weight_decay(settings, small, big, tmp_path, monkeypatch):
    from trt_kd.training.trainer import DistillTrainer

    seen = []
    create = DistillTrainer.create_optimizer

    def look(self):
        optimizer = create(self)
        seen.append((optimizer, list(self.features.parameters())))
        return optimizer

    monkeypatch.setattr(DistillTrainer, "create_optimizer", look)
    config = settings(*STATEFUL[:2], weight_decay=0.1, steps=2)
    distill(config, student=small, teacher=big, out=tmp_path / "o")
    optimizer, parameters = seen[-1]
    (group,) = [g for g in optimizer.param_groups if g["params"][0] is parameters[0]]
    assert group["weight_decay"] == 0.0
    assert len(group["params"]) == len(parameters) == 5
    assert all(optimizer.state[p]["step"] >= 1 for p in parameters)


def test_a_rehearsal_runs_on_a_twin_of_two_layers(settings, small, big, tmp_path):
    deep = settings(
        {"loss": "mse", "pairs": [[20, 29]], "projector": "linear", "until_step": 3, "alone": True},
        {"loss": "minilm", "pairs": "cka", "count": 6},
    )
    config = deep.rehearsal()
    assert config == DistillConfig.model_validate(config.model_dump())
    trained = distill(config, student=small, teacher=big, out=tmp_path / "out")
    assert trained.metrics["steps"] == 2


def test_the_control_has_no_features(settings):
    assert settings({"loss": "mse"}).cross_entropy().features == []


# --- what it refuses ----------------------------------------------------------------------------


def refused(message, config, tmp_path, monkeypatch, **roles):
    monkeypatch.setattr("trt_kd.stages.distill.load_model", None)
    with pytest.raises(ConfigError, match=message) as raised:
        distill(config, **roles, out=tmp_path / "out")
    assert raised.value.hint
    assert "\n" not in raised.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"loss": "pkt", "pairs": [[0, 3]]}, "layer 3 of the teacher, which has 3"),
        ({"loss": "pkt", "pairs": [[2, 0]]}, "layer 2 of the student, which has 2"),
        ({"loss": "pkt", "count": 3}, "3 layers are to be paired and the student has 2"),
        ({"loss": "pkt", "pairs": "cka", "count": 3}, "3 layers are to be paired"),
        ({"loss": "mse"}, "channel by channel, .* 16 wide, the teacher's 32"),
        ({"loss": {"kind": "minilm", "heads": 3}}, "3 relation heads do not divide"),
        ({"loss": {"kind": "minilm_v1", "heads": 2}}, "2 attention heads, the teacher has 4"),
        ({"loss": "minilm_v1"}, "8 attention heads, the student has 2"),
    ],
)
def test_layers_that_cannot_be_compared_are_found_before_a_model_is_loaded(
    feature, message, settings, roles, tmp_path, monkeypatch
):
    refused(message, settings(feature), tmp_path, monkeypatch, **roles)


def test_a_loss_that_stands_twice_on_a_pair_is_refused(settings, small, big, tmp_path, monkeypatch):
    config = settings({"loss": "pkt"}, {"loss": "pkt", "pairs": [[1, 1]]})
    refused(r"pkt stands twice on the pair \[1, 1\]", config, tmp_path, monkeypatch,
            student=small, teacher=big)  # fmt: skip


def test_kept_layers_that_no_manifest_tells_are_refused(settings, made, big, tmp_path, monkeypatch):
    stranger = made(4, num_hidden_layers=2, hidden_size=32, intermediate_size=32)
    config = settings({"loss": "pkt", "pairs": "kept"})
    refused("does not say which layers were kept", config, tmp_path, monkeypatch,
            student=stranger, teacher=big)  # fmt: skip


def test_features_need_a_teacher(settings, small, tmp_path, monkeypatch):
    config = settings({"loss": "pkt"}, response_weight=0.0, task_weight=1.0)
    refused("features need a teacher and none", config, tmp_path, monkeypatch, student=small)


@pytest.mark.parametrize(
    ("feature", "changes", "message"),
    [
        ({"loss": "mse"}, {"teacher": "cached"}, "features need a teacher that runs beside"),
        ({"loss": "mse", "weight": 0}, {}, "weight 0 has no effect"),
        ({"loss": "mse", "alone": True}, {}, "alone needs until_step"),
        ({"loss": "mse", "until_step": STEPS}, {}, "until_step 4 must be below steps 4"),
        ({"loss": "minilm", "projector": "linear"}, {}, "projector linear does not fit minilm"),
        ({"loss": "minilm", "normalise": "batch"}, {}, "normalise batch does not fit minilm"),
        ({"loss": "minilm_v1", "normalise": "batch"}, {}, "batch does not fit minilm_v1"),
        ({"loss": "forward_kl"}, {}, "unknown feature loss 'forward_kl'; available: mse"),
        ({"loss": "mse", "projector": "square"}, {}, "unknown projector 'square'"),
        ({"loss": "mse", "layers": 3}, {}, "Extra inputs"),
        ({"pairs": "kept"}, {}, "loss"),
        ({"loss": "mse", "projector": {"kind": "none", "side": "teacher"}}, {}, "Extra inputs"),
        (
            {"loss": "mse", "weight": {"kind": "linear", "end": 1.0, "steps": 9}},
            {},
            "features.0.weight.steps 9 must be at most",
        ),
    ],
)
def test_features_that_make_no_sense_are_refused(feature, changes, message, settings):
    with pytest.raises(ValidationError, match=message):
        settings(feature, **changes)


def test_settings_round_trip_with_their_features(settings):
    config = settings(
        {"loss": {"kind": "logsum", "alpha": 5.0}, "pairs": [[0, 1]], "projector": "orthogonal"},
        {"loss": "minilm", "weight": {"kind": "cosine", "end": 1.0}},
    )
    assert DistillConfig.model_validate(config.model_dump()) == config
    assert DistillConfig.model_validate_json(config.model_dump_json()) == config
    assert config.model_dump()["features"][0]["loss"]["alpha"] == 5.0


def test_the_recipes_of_the_page_are_valid():
    page = (Path(__file__).parents[2] / "docs/features.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    recipes = [yaml.safe_load(text) for block in blocks for text in block.split("\n\n")]
    assert len(recipes) == 5
    for recipe in recipes:
        settings = recipe.get("distill", recipe)
        assert DistillConfig.model_validate({"steps": 300, **settings}).features
