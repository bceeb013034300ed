"""Tasks through lm-evaluation-harness: our own from memory, any other by its name."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any

import numpy as np
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate as run_harness
from lm_eval.tasks import TaskManager

from trt_kd.errors import ConfigError, DataError
from trt_kd.evaluation.fidelity import mean_and_stderr
from trt_kd.evaluation.session_lm import SessionLM
from trt_kd.evaluation.task import ChoiceItem

METRICS = ("acc", "exact_match")


@dataclass(frozen=True)
class TaskResult:
    """One task's outcome."""

    name: str
    correct: tuple[float, ...]
    """1 or 0 per item, in the order of the items, for paired comparisons between models."""

    def summary(self) -> dict[str, float | int | None]:
        """Accuracy, its standard error over items and their number."""
        accuracy, error = mean_and_stderr(np.array(self.correct, dtype=np.float64))
        return {"accuracy": accuracy, "stderr": error, "n": len(self.correct)}


class ItemTask(ConfigurableTask):  # type: ignore[misc]
    """A list of items as lm-eval sees a task; nothing is downloaded or cached."""

    def __init__(self, name: str, items: Sequence[ChoiceItem]) -> None:
        self._items = items
        super().__init__(
            config={
                "task": name,
                "output_type": "multiple_choice",
                "test_split": "test",
                "doc_to_text": itemgetter("prompt"),
                "doc_to_choice": itemgetter("choices"),
                "doc_to_target": itemgetter("answer"),
                "num_fewshot": 0,
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            }
        )

    def download(self, *args: Any, **kwargs: Any) -> None:
        """Make the data set in memory."""
        self.dataset = {"test": Dataset.from_list([asdict(item) for item in self._items])}

    def build_all_requests(self, *, limit: int | None = None, **kwargs: Any) -> None:
        """Make the requests: no examples before the prompt, no chat template, no cache."""
        self._instances = [
            request
            for number, doc in self.doc_iterator(limit=limit)
            for request in self.construct_requests(
                doc, self.doc_to_text(doc), metadata=(self.config.task, number, 1)
            )
        ]


def run_items(lm: SessionLM, name: str, items: Sequence[ChoiceItem]) -> TaskResult:
    """Ask ``lm`` every item of a task of our own.

    Raises:
        ValueError: if there is no item.
        VerificationError: if the model's logits are not finite.
    """
    if not items:
        raise ValueError(f"task {name} has no items")
    return _run(lm, name, {name: ItemTask(name, items)}, limit=None)


def run_named(lm: SessionLM, name: str, *, limit: int, seed: int) -> TaskResult:
    """Ask ``lm`` the first ``limit`` items of lm-eval's task, tag or group ``name``.

    Of a group every task gives ``limit`` items, and all items count alike.

    Raises:
        ConfigError: if lm-eval does not know the task, or it has no accuracy.
        DataError: if its data cannot be loaded.
    """
    manager = TaskManager()
    if name not in manager.all_tasks:
        raise ConfigError(
            f"unknown task {name!r}", hint="`lm-eval ls tasks` lists those of lm-eval"
        )
    try:
        tasks = manager.load([name])["tasks"]
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"the data of task {name!r} cannot be loaded: {reason}",
            hint="it comes from the Hugging Face hub; leave the task out where there is none",
        ) from error
    for task in tasks.values():
        task.set_fewshot_seed(seed=seed)
    return _run(lm, name, tasks, limit=limit)


def _run(lm: SessionLM, name: str, tasks: dict[str, Any], *, limit: int | None) -> TaskResult:
    found = run_harness(lm=lm, task_dict=tasks, limit=limit, bootstrap_iters=0, log_samples=True)
    samples = found["samples"]
    return TaskResult(name, tuple(c for task in tasks for c in _correct(name, samples[task])))


def _correct(name: str, samples: Iterable[dict[str, Any]]) -> list[float]:
    """Outcome per item, under the first of lm-eval's filters."""
    by_item: dict[int, float] = {}
    for sample in samples:
        metric = next((metric for metric in METRICS if metric in sample), None)
        if metric is None:
            raise ConfigError(
                f"task {name!r} has no accuracy, it gives {', '.join(sample['metrics'])}",
                hint="choose a task with the metric acc or exact_match",
            )
        by_item.setdefault(int(sample["doc_id"]), float(sample[metric]))
    return [by_item[item] for item in sorted(by_item)]
