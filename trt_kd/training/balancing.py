"""Norms of the terms' gradients on what they share, and the weights that follow from them.

Shape suffixes: B sequences, L positions, D hidden size.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trt_kd.architectures import architecture_of
from trt_kd.architectures.hooks import hooks
from trt_kd.training.balance import Balance
from trt_kd.training.schedule import Schedule

NORM, WEIGHT = "balanced_norm_", "balanced_weight_"
"""Beginnings of names in the log."""
ORDER = ("response", "task")
"""Terms that the others are measured by, the first that runs; else the first feature."""


class Balancer:
    """Running means of the norms; what it knows stands in the log, where a resumed run finds it."""

    def __init__(self, config: Balance) -> None:
        self.config = config
        self.means: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._step: int | None = None

    def due(self, step: int, terms: Iterable[str], log: Iterable[Mapping[str, Any]]) -> bool:
        """Whether the norms are measured now: in the first pass of a step, on its turn.

        A term that is new is measured at once. In a resumed run ``log`` is where the means are.
        """
        if self._step is None:
            for entry in log:
                self.means |= {
                    name.removeprefix(NORM): value
                    for name, value in entry.items()
                    if name.startswith(NORM)
                }
        first, self._step = self._step != step, step
        new = any(name not in self.means for name in terms)
        return first and (new or step % self.config.every_steps == 0)

    def take(self, norms: Mapping[str, float]) -> None:
        """Take a measurement into the means; a term that had no gradient waits for its next."""
        decay = self.config.decay
        for name, norm in norms.items():
            if norm > 0:
                mean = self.means.get(name, norm)
                self.means[name] = decay * mean + (1 - decay) * norm

    def weights(self, asked: Mapping[str, float]) -> dict[str, float]:
        """Weights with which the norms of the terms are to each other as ``asked``.

        The first of ``ORDER`` keeps its own. So does a term whose norm is not known.
        """
        named = next((name for name in (*ORDER, *asked) if name in asked), None)
        base = self.means.get(named) if named else None
        self._weights = {
            name: weight * (base / self.means[name] if base and name in self.means else 1.0)
            for name, weight in asked.items()
        }
        return self._weights

    def logged(self) -> dict[str, float]:
        """Means and weights of the step, by their names in the log."""
        means = {f"{NORM}{name}": value for name, value in self.means.items()}
        return means | {f"{WEIGHT}{name}": value for name, value in self._weights.items()}


def balancer_of(schedule: Schedule) -> Balancer | None:
    """What balances the terms of a run, where it wants that."""
    return Balancer(schedule.balance) if schedule.balance else None


def gradient_norms(values: Mapping[str, Tensor], shared_BLD: Tensor) -> dict[str, float]:
    """Norm of the gradient of every value on ``shared_BLD``.

    The graph is kept; a value that does not depend on it has norm 0.
    """
    found = {}
    for name, value in values.items():
        (gradient,) = torch.autograd.grad(value, shared_BLD, retain_graph=True, allow_unused=True)
        found[name] = 0.0 if gradient is None else float(gradient.double().norm())
    return found


@contextmanager
def shared_by(student: PreTrainedModel, place: int | None) -> Iterator[list[Tensor]]:
    """Fill what is yielded with the next forward pass's input of layer ``place``.

    ``place`` may be the number of layers: the output of the last; None stands for nothing.
    """
    seen: list[Tensor] = []
    if place is None:
        yield seen
        return
    layers = architecture_of(student.config.model_type).layers(student)
    with hooks() as hook:
        if place:
            hook(layers[place - 1], "output", seen.append)
        else:
            hook(layers[0], "input", seen.append)
        yield seen
