"""The measurements of a trainer on held-out text.

Shape suffixes: B sequences, L positions, K positions that predict, T valid tokens, D hidden size.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast
from numpy.typing import NDArray
from torch import Tensor

from trt_kd.training import packing
from trt_kd.training.head import TeacherRows, linear_head
from trt_kd.training.heldout import heldout_sums


class Measured:
    """Mixed into a trainer that knows its student's hidden states and its teacher's rows."""

    one_vocabulary: bool = True  # else there is no divergence to measure token by token
    _heldout_rows: list[Callable[[slice], TeacherRows] | None]

    @torch.no_grad()
    def measure(
        self,
        blocks: NDArray[np.int64],
        batch_size: int,
        counted: NDArray[np.bool_] | None = None,
    ) -> dict[str, float]:
        """Task loss and entropy of the student on ``blocks`` ``[N, L]``, in nats per token.

        With a teacher also the divergence from it and the share of tokens at which both find the
        same token likeliest. The teacher runs once: give the same blocks every time. Of several
        processes each makes the same call. ``counted`` ``[N, L]`` are the tokens to be predicted.
        """
        trainer: Any = self
        model = trainer.model_wrapped
        sums, count, training = torch.zeros(4, dtype=torch.float64), 0, model.training
        model.eval()
        for number, start in enumerate(range(0, len(blocks), batch_size)):
            rows = slice(start, start + batch_size)
            tokens_BL = torch.from_numpy(blocks[rows]).to(trainer.args.device)
            mask_BK = packing.goes_on(tokens_BL, trainer.end)
            if counted is not None:
                mask_BK &= torch.from_numpy(counted[rows, 1:]).to(mask_BK.device)
            hidden_TD = trainer._hidden_states(model, tokens_BL)[:, :-1][mask_BK]
            if number == len(self._heldout_rows):
                beside = trainer._teacher_rows(tokens_BL, mask_BK) if self.one_vocabulary else None
                self._heldout_rows.append(beside)
            labels_T = tokens_BL[:, 1:][mask_BK]
            sums += self._heldout_sums(hidden_TD, labels_T, self._heldout_rows[number]).cpu()
            count += len(labels_T)
        trainer._token_sums = {}  # training logs its own
        model.train(training)
        task, entropy, divergence, agreement = (sums / count).tolist()
        found = {
            "heldout_task_nats_per_token": task,
            "heldout_entropy_nats_per_token": entropy,
        }
        if self._heldout_rows[0] is not None:
            found["heldout_kl_nats_per_token"] = divergence
            found["heldout_top1_agreement"] = agreement
        return found

    def _heldout_sums(
        self,
        hidden_TD: Tensor,
        labels_T: Tensor,
        teacher: Callable[[slice], TeacherRows] | None,
    ) -> Tensor:
        trainer: Any = self
        student = trainer.accelerator.unwrap_model(trainer.model)

        def summed() -> Tensor:
            head = linear_head(student).cast(trainer.head_dtype)
            return heldout_sums(hidden_TD, head, labels_T, teacher)

        return trainer._sharded_liger_compute(summed)  # type: ignore[no-any-return]

    def agreed(self, values: dict[str, float]) -> dict[str, float]:
        """The values of process 0, so that what follows from them is the same everywhere."""
        told = torch.tensor(list(values.values()), dtype=torch.float64)
        return dict(zip(values, broadcast(told).tolist(), strict=True))
