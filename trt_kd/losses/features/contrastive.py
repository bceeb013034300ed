"""Contrastive representation distillation with a memory of the teacher's earlier features.

Source: Tian et al. 2020, CRD (arXiv:1910.10699). What differs: the student is the anchor only, not
the teacher as well; the memory is a queue of the teacher's latest features instead of one row for
each training example, since text has no examples that come again.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveFloat, PositiveInt

from trt_kd.losses.features.base import FeatureLoss

if TYPE_CHECKING:
    from torch import Tensor

    from trt_kd.losses.features.base import Pair


class ContrastiveRepresentation(FeatureLoss):
    r"""Tells the teacher's feature of the same token from M remembered ones of other tokens.

    :math:`\sum_t -\log h(s_t, t_t) - \sum_m \log(1 - h(s_t, t_m))` with
    :math:`h(s, t) = e_{st} / (e_{st} + M)` and :math:`e_{st} = e^{\cos(s, t) / \tau} / Z_s`, where
    :math:`Z_s`, held constant by the gradient, is the mean over the memory. Without a memory yet
    the loss is zero.
    """

    same_width: ClassVar[bool] = True
    zero_at_agreement: ClassVar[bool] = False

    kind: Literal["crd"] = "crd"
    """Name in the registry."""
    temperature: PositiveFloat = 0.07
    """Divides the cosines."""
    memory: PositiveInt = 2048
    """Tokens of earlier steps that are remembered."""

    @property
    def memory_rows(self) -> int:
        """See the base class."""
        return self.memory

    def total(self, pair_BLD: "Pair", mask_BL: "Tensor", memory_MD: "Tensor | None") -> "Tensor":
        """See the base class."""
        from trt_kd.losses.features.maths import contrastive, valid_rows

        student_TD, teacher_TD = valid_rows(*pair_BLD, mask_BL)
        if memory_MD is None or not len(memory_MD):
            return student_TD[:0].sum()
        return contrastive(student_TD, teacher_TD, memory_MD, self.temperature)
