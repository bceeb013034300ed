"""The student's own deeper exit as a teacher of its layers.

Sources: Zhang et al. 2019, Be Your Own Teacher (arXiv:1905.08094); Elhoushi et al. 2024, LayerSkip
(arXiv:2404.16710), for exits through the model's own norm and head.
"""

from typing import Annotated

from pydantic import Field, NonNegativeInt, model_validator
from typing_extensions import Self

from trt_kd.config import StrictModel, plugin_field
from trt_kd.errors import ConfigError
from trt_kd.losses import LOSSES
from trt_kd.losses.base import KDLoss
from trt_kd.losses.kl import ForwardKL
from trt_kd.training.weights import Weight, over_whole_run, peak


class Exits(StrictModel):
    """Layers whose states, through the final norm and head, learn what the last layer says."""

    layers: Annotated[list[NonNegativeInt], Field(min_length=1)]
    """Layers to leave after, counted from 0; the last one is the model itself."""
    weight: Weight = 0.1
    """Factor of every exit's loss, or its schedule."""
    loss: plugin_field(LOSSES, KDLoss) = ForwardKL()  # type: ignore[valid-type]
    """How far an exit is from the model's output, into which no gradient flows from it."""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if not peak(self.weight):
            raise ValueError("weight 0 has no effect: leave exits out")
        if len(set(self.layers)) < len(self.layers):
            raise ValueError("a layer stands twice")
        if self.loss.needs_labels:
            raise ValueError(f"{self.loss.kind} needs the true next tokens: take another loss")
        return self

    def check(self, depth: int) -> None:
        """Check that a student of ``depth`` layers has something behind every exit.

        Raises:
            ConfigError: if it has not.
        """
        for layer in self.layers:
            if layer >= depth - 1:
                raise ConfigError(
                    f"exits: nothing follows layer {layer} of the student, which has {depth}",
                    hint=f"give layers from 0 to {depth - 2}",
                )

    def rehearsal(self) -> Self:
        """The exit after the first layer, which a twin of two layers has."""
        weight = over_whole_run(self.weight)
        return self.model_copy(update={"layers": [0], "weight": weight})
