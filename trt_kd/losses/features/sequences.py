"""Losses between summaries of a sequence's features.

Sources: Sun et al. 2019, PKD-BERT (arXiv:1908.09355); Zagoruyko and Komodakis 2017, attention
transfer (arXiv:1612.03928); Huang and Wang 2017, NST (arXiv:1707.01219).
"""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from trt_kd.losses.features.base import SequenceLoss

if TYPE_CHECKING:
    from torch import Tensor


class PatientKD(SequenceLoss):
    r"""Squared distance of the last token's directions, :math:`\|s/\|s\| - t/\|t\|\|^2`.

    The last valid token takes the place of BERT's first one: it has seen the whole sequence.
    """

    same_width: ClassVar[bool] = True

    kind: Literal["pkd"] = "pkd"
    """Name in the registry."""

    def sequence(self, student_ND: "Tensor", teacher_ND: "Tensor") -> "Tensor":
        """See the base class."""
        from torch.nn import functional

        student_D, teacher_D = (
            functional.normalize(x, dim=-1) for x in (student_ND[-1], teacher_ND[-1])
        )
        return (student_D - teacher_D).square().sum()


class AttentionTransfer(SequenceLoss):
    r"""Squared distance of activation maps: which tokens of the sequence are strong.

    A map is :math:`\sum_d |x_{nd}|^p` over the tokens n, divided by its norm.
    """

    kind: Literal["attention_transfer"] = "attention_transfer"
    """Name in the registry."""
    power: Annotated[float, Field(ge=1)] = 2.0
    """Power p; a large one looks at the strongest channels only."""

    def sequence(self, student_ND: "Tensor", teacher_ND: "Tensor") -> "Tensor":
        """See the base class."""
        from torch.nn import functional

        student_N, teacher_N = (
            functional.normalize(x.abs().pow(self.power).sum(-1), dim=-1)
            for x in (student_ND, teacher_ND)
        )
        return (student_N - teacher_N).square().sum()


class NeuronSelectivityTransfer(SequenceLoss):
    r"""Squared maximum mean discrepancy of the channels, each one a pattern over the tokens.

    Patterns have norm one and are compared by the polynomial kernel :math:`(x^\top y)^d`.
    """

    kind: Literal["nst"] = "nst"
    """Name in the registry."""
    degree: PositiveInt = 2
    """Degree d of the kernel."""

    def sequence(self, student_ND: "Tensor", teacher_ND: "Tensor") -> "Tensor":
        """See the base class."""
        from trt_kd.losses.features.maths import squared_mmd

        return squared_mmd(student_ND, teacher_ND, self.degree)
