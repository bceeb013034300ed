"""What the settings of a distillation say, done to a model in memory."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from trt_kd.teachers.base import Demand
from trt_kd.training.history import TrainingLog
from trt_kd.training.run import Run, Text
from trt_kd.training.weights import weight_at

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from trt_kd.stages.distill import DistillConfig
    from trt_kd.teachers.cache import Cache


def train_student(
    config: "DistillConfig",
    model: "PreTrainedModel",
    blocks: "NDArray[np.int64]",
    teacher: "Path | Cache | None",
    work: Path,
    *,
    heldout: "NDArray[np.int64] | None" = None,
) -> TrainingLog:
    """Train ``model`` in place on ``blocks`` in order, in this process; return the log.

    ``teacher`` is a checkpoint, or a cache of log-probabilities that holds every block, those of
    ``heldout`` included, which the monitor measures on; without them there is none.
    """
    return train_in(Run(config, work), config, model, Text(blocks, heldout), teacher)


def train_in(
    run: Run,
    config: "DistillConfig",
    model: "PreTrainedModel",
    text: Text,
    teacher: "Path | Cache | None",
) -> TrainingLog:
    """The same among the processes of ``run``, each of which has to call it.

    Raises:
        ValueError: if documents shall be told apart and the run does not say what ends one.
    """
    if config.packing.reset and run.end is None:
        raise ValueError("packing.reset needs the token that ends a document: give the run its end")
    import numpy as np

    from trt_kd.training.head import Objective
    from trt_kd.training.loop import train

    def objective_at(step: int) -> Objective:
        task, response = (
            weight_at(weight, step, config.steps)
            for weight in (config.task_weight, config.response_weight)
        )
        if config.on_policy is not None and config.on_policy.draws(step, config.seed):
            task = 0.0  # there are no true tokens
        return Objective(config.loss, task, response, config.label_smoothing)

    seen = text.blocks if text.heldout is None else np.concatenate([text.blocks, text.heldout])
    vocabulary = model.config.vocab_size
    demand = Demand(seen, config.precision, run.work, vocabulary, run.tokenizer)
    with run.processes.main_first():  # it writes a cache, the others read it
        targets = config.teacher.targets(teacher, demand) if isinstance(teacher, Path) else teacher
    if config.features:
        from trt_kd.training.similarity import by_similarity

        beside = cast("PreTrainedModel", targets)
        features = by_similarity(config.features, model, beside, text.blocks, run.work)
        run = replace(run, schedule=config.model_copy(update={"features": features}))
    return train(model, targets, text, objective_at=objective_at, run=run)
