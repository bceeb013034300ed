"""What a distillation is said to cost: nothing that it does is left out."""

import json

import pytest

from trt_kd.architectures.shape import ModelShape, shape_from_config
from trt_kd.pipeline import estimate as module
from trt_kd.pipeline.training_cost import training_bytes, training_flops, writing_s
from trt_kd.stages.distill import DistillConfig

RATE = 1e11
ONE, TWO = {"loss": "mse", "pairs": [[1, 2]]}, {"loss": "mse", "pairs": [[1, 2], [3, 6]]}
WRITE = {"share": 0.5, "prompt_tokens": 64, "new_tokens": 192}
ALONE = WRITE | {"share": 1.0}
MINILLM = {"loss": "reverse_kl", "on_policy": ALONE | {"policy_gradient": {"teacher_mix": 0.0}}}
MIXED = {"loss": "reverse_kl", "on_policy": ALONE | {"policy_gradient": {"teacher_mix": 0.2}}}
GROWS = {
    "a teacher": ({"response_weight": 0.0, "task_weight": 1.0}, {}),
    "another teacher": (
        {"teacher": {"kind": "several", "others": ["a"]}},
        {"teacher": {"kind": "several", "others": ["a", "b"]}},
    ),
    "a feature": ({}, {"features": [ONE]}),
    "another pair": ({"features": [ONE]}, {"features": [TWO]}),
    "a rule's pairs": (
        {"features": [{"loss": "pkt", "count": 1}]},
        {"features": [{"loss": "pkt", "count": 3}]},
    ),
    "another reading": (
        {"features": [{"loss": {"kind": "minilm", "relations": ["keys"]}}]},
        {"features": [{"loss": "minilm"}]},
    ),
    "a feature that stays": ({"features": [ONE | {"until_step": 5}]}, {"features": [ONE]}),
    "a projector": ({"features": [ONE]}, {"features": [ONE | {"projector": "linear"}]}),
    "a larger projector": (
        {"features": [ONE | {"projector": "linear"}]},
        {"features": [ONE | {"projector": "mlp"}]},
    ),
    "longer own text": ({"on_policy": WRITE}, {"on_policy": WRITE | {"new_tokens": 256}}),
    "a policy gradient": (MINILLM | {"on_policy": ALONE}, MINILLM),
    "a teacher that writes along": (MINILLM, MIXED),
    "an exit": ({}, {"exits": {"layers": [1]}}),
    "another exit": ({"exits": {"layers": [1]}}, {"exits": {"layers": [1, 2]}}),
    "a balance": ({"task_weight": 0.5}, {"task_weight": 0.5, "balance": {}}),
    "a closer balance": (
        {"task_weight": 0.5, "balance": {"every_steps": 10}},
        {"task_weight": 0.5, "balance": {"every_steps": 1}},
    ),
    "a monitor": ({"monitor": None}, {}),
    "a closer monitor": ({}, {"monitor": {"every_steps": 5}}),
    "gradient checkpointing": ({}, {"gradient_checkpointing": True}),
    "more steps": ({}, {"steps": 101}),
}
HOLDS_MORE = ("another teacher", "a feature", "another pair", "a rule's pairs", "another reading",
              "a projector", "a larger projector")  # fmt: skip


@pytest.fixture(scope="module")
def shapes(llama_config) -> tuple[ModelShape, ModelShape]:
    return tuple(shape_from_config(llama_config(ffn)) for ffn in (768, 1536))


@pytest.fixture(autouse=True)
def others(llama_config, tmp_path, monkeypatch):
    """Folders of further teachers: ``a`` is as wide as the student, ``b`` four times as wide."""
    monkeypatch.chdir(tmp_path)
    for name, width in (("a", 768), ("b", 3072)):
        (tmp_path / name).mkdir()
        text = json.dumps(llama_config(width))
        (tmp_path / name / "config.json").write_text(text, encoding="utf-8")


def seconds(config, shapes):
    return training_flops(config, *shapes) / RATE + writing_s(config, *shapes, RATE)


@pytest.mark.parametrize("name", GROWS)
def test_more_to_do_costs_more(shapes, name):
    less, more = (DistillConfig.model_validate(changes) for changes in GROWS[name])
    assert seconds(more, shapes) > seconds(less, shapes)
    one, other = (training_bytes(config, *shapes) for config in (less, more))
    assert other > one if name in HOLDS_MORE else other >= one


def test_plain_distillation_is_three_passes_of_the_student_and_one_of_the_teacher(shapes):
    config = DistillConfig(monitor=None)
    student, teacher = (shape.forward_flops_per_token() for shape in shapes)
    assert training_flops(config, *shapes) == config.tokens * (3 * student + teacher)
    assert writing_s(config, *shapes, RATE) == 0.0


def test_own_text_is_written_token_by_token_at_the_speed_of_memory_or_of_the_products(shapes):
    config = DistillConfig.model_validate(
        {"on_policy": ALONE, "steps": 10, "batch_size": 2, "monitor": None}
    )
    student = shapes[0]
    flops = 2 * student.forward_flops_per_token()
    token_s = 4 * student.parameters / 1e10
    slow = writing_s(config, *shapes, 1e15)
    assert slow == pytest.approx(10 * (64 * flops / 1e15 + 192 * token_s))
    assert writing_s(config, *shapes, 1e7) == pytest.approx(10 * 256 * flops / 1e7)
    student_flops, teacher_flops = (shape.forward_flops_per_token() for shape in shapes)
    tokens = 10 * 2 * (64 + 192)
    assert training_flops(config, *shapes) == tokens * (3 * student_flops + teacher_flops)


def test_a_plan_s_estimate_of_a_distillation_is_made_of_these(shapes, matrix_rate):
    config = DistillConfig.model_validate({"features": [TWO], "on_policy": WRITE})
    time_s, memory, disk = module._COSTS["distill"](config, *shapes)
    expected = training_flops(config, *shapes) / (module.TRAINING_SHARE * matrix_rate)
    expected += writing_s(config, *shapes, module.FORWARD_SHARE * matrix_rate)
    assert time_s == pytest.approx(expected)
    assert memory == training_bytes(config, *shapes)
    assert disk == 14.0 * shapes[0].parameters


@pytest.mark.parametrize("combine", ["probabilities", "logits", "best"])
def test_several_teachers_count_by_their_own_sizes(shapes, llama_config, combine):
    student, teacher = shapes
    several = {"kind": "several", "others": ["a", "b"], "combine": combine}
    config = DistillConfig.model_validate({"teacher": several, "monitor": None})
    sizes = [teacher, student, shape_from_config(llama_config(3072))]
    flops = 3 * student.forward_flops_per_token() + sum(x.forward_flops_per_token() for x in sizes)
    assert training_flops(config, *shapes) == pytest.approx(config.tokens * flops)
    one = training_bytes(DistillConfig(monitor=None), *shapes)
    more = 4 * sum(x.parameters for x in sizes[1:])
    assert training_bytes(config, *shapes) - one == pytest.approx(more)


def test_what_no_teacher_teaches_holds_none(shapes):
    with_one, without = (
        DistillConfig.model_validate(changes)
        for changes in ({}, {"response_weight": 0.0, "task_weight": 1.0})
    )
    held = training_bytes(with_one, *shapes) - training_bytes(without, *shapes)
    assert held == pytest.approx(4 * shapes[1].parameters)
