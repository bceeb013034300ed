"""Maps between the widths of two models' features; discarded after training.

Sources: Romero et al. 2015, FitNets (arXiv:1412.6550) for a trained regressor; Miles et al. 2024,
VkD (arXiv:2403.06213) for an orthogonal one.
"""

from typing import TYPE_CHECKING, Literal

from trt_kd.losses.features.base import Projector

if TYPE_CHECKING:
    from torch import nn


class NoProjector(Projector):
    """Compare features as they are."""

    kind: Literal["none"] = "none"
    """Name in the registry."""

    def build(self, inputs: int, outputs: int) -> None:
        """See the base class."""
        return


class TrainedProjector(Projector):
    """A map with parameters, on one side."""

    side: Literal["student", "teacher"] = "student"
    """Whose features it maps; one on the teacher's side may learn to throw away what is hard."""

    @property
    def on_teacher(self) -> bool:
        """See the base class."""
        return self.side == "teacher"


class LinearProjector(TrainedProjector):
    """One matrix, without bias, orthogonal at the start."""

    kind: Literal["linear"] = "linear"
    """Name in the registry."""

    def build(self, inputs: int, outputs: int) -> "nn.Module":
        """See the base class."""
        from torch import nn

        linear = nn.Linear(inputs, outputs, bias=False)
        nn.init.orthogonal_(linear.weight)
        return linear


class MlpProjector(TrainedProjector):
    """Two layers with GELU between them, as wide as the wider side."""

    kind: Literal["mlp"] = "mlp"
    """Name in the registry."""

    def build(self, inputs: int, outputs: int) -> "nn.Module":
        """See the base class."""
        from torch import nn

        width = max(inputs, outputs)
        return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, outputs))


class OrthogonalProjector(TrainedProjector):
    """A matrix with orthonormal rows or columns, kept so by its parametrization.

    It turns and embeds but cannot stretch: the student cannot leave the work to the projector.
    """

    kind: Literal["orthogonal"] = "orthogonal"
    """Name in the registry."""

    def build(self, inputs: int, outputs: int) -> "nn.Module":
        """See the base class."""
        from torch import nn
        from torch.nn.utils.parametrizations import orthogonal

        linear = nn.Linear(inputs, outputs, bias=False)
        nn.init.orthogonal_(linear.weight)
        return orthogonal(linear, orthogonal_map="matrix_exp")
