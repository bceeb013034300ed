"""Two tasks from one trace: to answer, and to say why.

Source: Hsieh et al. 2023, Distilling step-by-step (arXiv:2305.02301).
"""

from typing import TYPE_CHECKING

from pydantic import NonNegativeFloat, model_validator
from typing_extensions import Self

from trt_kd.config import StrictModel
from trt_kd.data.base import DataConfig
from trt_kd.data.two_tasks import TwoTaskText, weights
from trt_kd.errors import DataError
from trt_kd.training.run import Tasks, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trt_kd.training.schedule import Schedule


NAMES = ("label", "rationale")
"""Of the tasks in the log, in the order of ``LABEL`` and ``RATIONALE``."""


class TwoTasks(StrictModel):
    """Learn from traces as two tasks: mean loss of the answers' tokens, and of the rationales'."""

    rationale_weight: NonNegativeFloat = 1.0
    """Of the rationales beside 1 for the answers; 0 learns the answers of the same steps alone."""
    label_prefix: str = "[label] "
    """Stands before a prompt where the answer is asked; ``""`` leaves the prompt as it is."""
    rationale_prefix: str = "[rationale] "
    """Stands before it where the rationale is asked."""

    @model_validator(mode="after")
    def _tells_apart(self) -> Self:
        if self.label_prefix == self.rationale_prefix:
            raise ValueError(
                f"label_prefix and rationale_prefix are both {self.label_prefix!r}: the student "
                "cannot tell what it is asked for"
            )
        return self

    def check(self, data: DataConfig) -> None:
        """Check that the text holds traces.

        Raises:
            DataError: if it has none.
        """
        if not data.source.traced():
            raise DataError(
                f"data source {data.source.kind} holds no text with a trace and an answer",
                hint="let trt-kd generate write it with traces={}",
            )

    def text(
        self, data: DataConfig, tokenizer: "PreTrainedTokenizerBase", schedule: "Schedule"
    ) -> Text:
        """Blocks of all steps and of the monitor, with the weight of every token.

        Raises:
            DataError: if there are too few traces, or one is longer than a block.
        """
        self.check(data)
        prefixes = (self.label_prefix, self.rationale_prefix)
        source = TwoTaskText(data, tokenizer, prefixes, schedule.seed)
        found = source.blocks("train", schedule.sequences)
        step_blocks = schedule.batch_size * schedule.gradient_accumulation
        weights_NL = weights(found.task, step_blocks, self.rationale_weight)
        asked = zip(NAMES, (1.0, self.rationale_weight), strict=True)
        tasks = Tasks(found.task, {name: weight for name, weight in asked if weight})
        if (monitor := schedule.monitor) is None:
            return Text(found.tokens, weights=weights_NL, tasks=tasks)
        try:
            heldout = source.blocks("heldout", monitor.blocks, monitor.skip_blocks)
        except DataError as error:
            raise DataError(
                f"monitor: {error.args[0]}",
                hint="let the teacher write more, lower monitor.skip_blocks, raise "
                "data.heldout_share or data.block_tokens, or set monitor=null",
            ) from error
        counted_NL = weights(heldout.task, monitor.blocks, self.rationale_weight) > 0
        if not counted_NL.any():
            raise DataError(
                "monitor: no answer stands in its held-out blocks, and rationale_weight is 0",
                hint="set monitor.blocks to 2 or more",
            )
        return Text(found.tokens, heldout.tokens, weights_NL, counted_NL, tasks)
