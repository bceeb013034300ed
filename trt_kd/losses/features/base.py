"""What a loss on features is, and what a projector is.

Shape suffixes: B sequences, L positions, T valid tokens of all sequences, N valid tokens of one
sequence, M remembered rows, D width; student and teacher may differ in D.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from trt_kd.config import Plugin

if TYPE_CHECKING:
    from torch import Tensor, nn

    Pair: TypeAlias = tuple[Tensor, Tensor]

Reading = Literal["states", "queries", "keys", "values", "attention"]
"""Outputs of a layer, or what its attention is given: heads side by side, rotated if they are.
``attention`` is all three side by side: queries scaled, keys and values repeated for each query."""

Normalisation = Literal["none", "standardise", "batch", "whiten"]
"""What is done to features before they are compared; see ``normalising.py``."""


class FeatureLoss(Plugin, ABC):
    """How far what one layer of the student says is from what one layer of the teacher says.

    A sum over valid tokens; a member that compares whole sequences is a mean over each sequence
    times its number of valid tokens. So every member adds up over sequences and micro-batches.
    """

    same_width: ClassVar[bool] = False
    """Whether both sides need the same width, by a projector where the models differ."""
    zero_at_agreement: ClassVar[bool] = True
    """False where the loss is not zero, or not least, for equal features."""

    @property
    def reads(self) -> tuple[Reading, ...]:
        """What of a layer is compared; the loss is called for each and summed."""
        return ("states",)

    @property
    def attention_heads(self) -> int | None:
        """Heads that the attention of both models must have; None where any will do."""
        return None

    @property
    def memory_rows(self) -> int:
        """Rows of earlier features of the teacher that it wants to be shown; 0 for none."""
        return 0

    def problem(self, student_width: int, teacher_width: int) -> str | None:
        """Why features of these widths cannot be compared; None where they can."""
        if self.same_width and student_width != teacher_width:
            return (
                f"{self.kind} compares channel by channel, and the student's features are "
                f"{student_width} wide, the teacher's {teacher_width}"
            )
        return None

    def __call__(
        self,
        student_BLD: "Tensor",
        teacher_BLD: "Tensor",
        mask_BL: "Tensor",
        memory_MD: "Tensor | None" = None,
    ) -> "Tensor":
        """Sum the loss over the tokens that ``mask_BL`` marks as valid.

        Args:
            student_BLD: features ``[B, L, D]`` of any float dtype.
            teacher_BLD: features ``[B, L, D]`` of any float dtype.
            mask_BL: bool ``[B, L]``; where it is False may stand anything, NaN included.
            memory_MD: earlier features of the teacher ``[M, D]``; for members with ``memory_rows``.

        Returns:
            Scalar without unit, float32 (float64 for float64 features).

        Raises:
            ValueError: if shapes do not fit.
        """
        if problem := self.problem(student_BLD.shape[-1], teacher_BLD.shape[-1]):
            raise ValueError(problem)
        return self.total((student_BLD, teacher_BLD), mask_BL, memory_MD)

    @abstractmethod
    def total(self, pair_BLD: "Pair", mask_BL: "Tensor", memory_MD: "Tensor | None") -> "Tensor":
        """The sum over features of student and teacher whose widths are fit to be compared."""


class TokenLoss(FeatureLoss):
    """A loss that compares token with token."""

    same_width: ClassVar[bool] = True

    @abstractmethod
    def tokens(self, student_TD: "Tensor", teacher_TD: "Tensor") -> "Tensor":
        """Loss of every token, ``[T]``, from features in at least float32."""

    def total(self, pair_BLD: "Pair", mask_BL: "Tensor", memory_MD: "Tensor | None") -> "Tensor":
        """See the base class."""
        from trt_kd.losses.features.maths import valid_rows

        return self.tokens(*valid_rows(*pair_BLD, mask_BL)).sum()


class SequenceLoss(FeatureLoss):
    """A loss that compares what holds between the tokens or channels of a sequence."""

    least: ClassVar[int] = 1
    """Valid tokens below which a sequence says nothing and adds zero."""

    @abstractmethod
    def sequence(self, student_ND: "Tensor", teacher_ND: "Tensor") -> "Tensor":
        """Loss per token of one sequence, ``[]``, from features in at least float32."""

    def total(self, pair_BLD: "Pair", mask_BL: "Tensor", memory_MD: "Tensor | None") -> "Tensor":
        """See the base class."""
        from trt_kd.losses.features.maths import valid_sequences

        pairs, total = valid_sequences(*pair_BLD, mask_BL, self.least)
        for student_ND, teacher_ND in pairs:
            total = total + len(student_ND) * self.sequence(student_ND, teacher_ND)
        return total


class Projector(Plugin, ABC):
    """A map from the features of one side to the width of the other, trained with the student."""

    @property
    def on_teacher(self) -> bool:
        """Whether it maps the teacher's features instead of the student's."""
        return False

    @abstractmethod
    def build(self, inputs: int, outputs: int) -> "nn.Module | None":
        """A freshly initialized float32 map from ``[..., inputs]`` to ``[..., outputs]``.

        None stands for features as they are.
        """
