"""The text of a run as a dataset.

Shape suffixes: L positions.
"""

import numpy as np
import torch
from modelopt.torch.distill.plugins.huggingface import IGNORE_INDEX
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from trt_kd.training import packing
from trt_kd.training.run import Tasks


class Blocks(Dataset[dict[str, Tensor]]):
    """Token blocks ``[count, L]`` in their order; after ``end`` another document begins.

    With ``weights`` ``[count, L]`` tokens of weight 0 are not learnt; ``tasks`` says what the
    others are learnt for.
    """

    def __init__(
        self,
        blocks: NDArray[np.int64],
        end: int | None = None,
        weights: NDArray[np.float32] | None = None,
        tasks: Tasks | None = None,
    ) -> None:
        self.blocks = blocks
        self.end = end
        self.weights = weights
        self.tasks = tasks

    def __len__(self) -> int:
        """Count of blocks."""
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Token ids, the same as labels, weights, tasks; nothing predicts the first token."""
        tokens_L = torch.tensor(self.blocks[index])
        labels_L = tokens_L.clone()
        labels_L[0] = IGNORE_INDEX
        if self.end is not None:
            labels_L[1:][~packing.goes_on(tokens_L, self.end)] = IGNORE_INDEX
        found = {"input_ids": tokens_L, "labels": labels_L}
        if self.weights is not None:
            found["weights"] = torch.tensor(self.weights[index])
            labels_L[found["weights"] == 0] = IGNORE_INDEX
        if self.tasks is not None:
            found["tasks"] = torch.tensor(self.tasks.of[index])
        return found
