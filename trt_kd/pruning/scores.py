"""Scores of everything that an axis can cut, as a file that later searches read.

``scores.safetensors`` holds ``<axis>.<place>``, float64 ``[units]``, for every place of an axis
that cuts channels, and ``block_influence``, float64 ``[layers]``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trt_kd.errors import ModelError

FILE = "scores.safetensors"


@dataclass(frozen=True)
class Scores:
    """Scores of one unpruned model; what scores low is cut first."""

    channels: Mapping[str, Sequence[Tensor]]
    """By kind of axis: one tensor ``[units]`` for every place."""
    influence: Sequence[float]
    """Block influence per layer: mean over tokens of 1 - cos(input, output)."""
    tokens: int
    """Calibration tokens behind them."""

    def save(self, folder: Path) -> None:
        """Write them into ``folder``."""
        tensors = {
            f"{kind}.{number:04d}": scores_C.double().contiguous()
            for kind, places in self.channels.items()
            for number, scores_C in enumerate(places)
        }
        tensors["block_influence"] = torch.tensor(self.influence, dtype=torch.float64)
        save_file(tensors, folder / FILE, metadata={"tokens": str(self.tokens)})

    def of(self, kind: str) -> list[Tensor]:
        """Scores of every place of an axis.

        Raises:
            ModelError: if the axis was not scored.
        """
        if kind not in self.channels:
            raise ModelError(
                f"the scores know nothing of axis {kind!r}, only of {', '.join(self.channels)}",
                hint="score the model again with every axis that may be cut",
            )
        return list(self.channels[kind])

    @classmethod
    def load(cls, folder: Path) -> "Scores":
        """Read what ``save`` wrote.

        Raises:
            ModelError: if there is no such file.
        """
        path = folder / FILE
        if not path.is_file():
            raise ModelError(f"{folder} holds no {FILE}", hint="make it with trt-kd score")
        with safe_open(path, framework="pt") as file:
            tokens = int(file.metadata()["tokens"])
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        influence = tensors.pop("block_influence").tolist()
        channels: dict[str, list[Tensor]] = {}
        for name in sorted(tensors):
            channels.setdefault(name.partition(".")[0], []).append(tensors[name])
        return cls(channels, influence, tokens)
