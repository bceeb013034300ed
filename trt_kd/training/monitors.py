"""What is watched beside the losses of a step, how often, and where its text comes from."""

from typing import TYPE_CHECKING

from pydantic import NonNegativeInt, PositiveInt

from trt_kd.config import StrictModel
from trt_kd.data.base import DataConfig, token_blocks
from trt_kd.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase


class MonitorConfig(StrictModel):
    """Held-out text and gradients by layer, measured every few steps.

    One measurement is a forward pass of the student and both heads; the teacher's pass is made
    once. That is about a third of a step over as many blocks, so at every 20th step under 2 %.
    """

    every_steps: PositiveInt = 20
    """Steps between measurements; the first comes before training, the last at its end."""
    blocks: PositiveInt = 4
    """Held-out blocks of ``data.block_tokens`` tokens, the same every time."""
    skip_blocks: NonNegativeInt = 32
    """Held-out blocks left to the evaluate stage, which reads the first ones."""

    def due(self, step: int, total: int) -> bool:
        """Say whether ``step``, counted from 1, of a run of ``total`` steps is measured."""
        return step % self.every_steps == 0 or step == total

    def text(
        self, data: DataConfig, tokenizer: "PreTrainedTokenizerBase", *, seed: int
    ) -> "NDArray[np.int64]":
        """Held-out token blocks ``[blocks, block_tokens]`` that nothing trains on.

        Raises:
            DataError: if the held-out split is too short.
        """
        try:
            return token_blocks(
                data,
                tokenizer,
                split="heldout",
                count=self.blocks,
                offset=self.skip_blocks,
                seed=seed,
            )
        except DataError as error:
            raise DataError(
                f"monitor: {error.args[0]}",
                hint="give more text, lower data.block_tokens or monitor.skip_blocks, raise "
                "data.heldout_share, or set monitor=null",
            ) from error
