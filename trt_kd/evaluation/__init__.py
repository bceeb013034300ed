"""What a model can do and how far it is from its teacher.

To add a task of our own: write a module here with a subclass of ``ChoiceTask``, add one line
below. Any other name in a recipe is taken for a task of lm-evaluation-harness.
"""

from typing import TYPE_CHECKING

from trt_kd.registry import Registry

if TYPE_CHECKING:
    from trt_kd.evaluation.task import ChoiceTask

TASKS: Registry["type[ChoiceTask]"] = Registry(
    "task",
    {
        "docstring_continuation": "trt_kd.evaluation.continuation:DocstringContinuation",
        "facts": "trt_kd.evaluation.facts:Facts",
    },
)
