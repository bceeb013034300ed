"""What a distillation loss on logits is.

Shape suffixes: T tokens, V vocabulary.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from trt_kd.config import Plugin

if TYPE_CHECKING:
    from torch import Tensor


class KDLoss(Plugin, ABC):
    """How far the student's next-token distributions are from the teacher's.

    Every member is zero where the two agree, positive elsewhere, and a sum over valid tokens, so
    that it adds up over chunks and micro-batches.
    """

    @abstractmethod
    def __call__(self, student_TV: "Tensor", teacher_TV: "Tensor", mask_T: "Tensor") -> "Tensor":
        """Sum the loss over the tokens that ``mask_T`` marks as valid.

        Args:
            student_TV: logits ``[T, V]`` of any float dtype.
            teacher_TV: logits ``[T, V]`` of any float dtype; no gradient flows into them.
            mask_T: bool ``[T]``; a row that is False may hold anything, NaN included.

        Returns:
            Scalar in nats, float32 (float64 for float64 logits).

        Raises:
            ValueError: if the two logits differ in shape.
        """

    def value_and_gradient(
        self, student_TV: "Tensor", teacher_TV: "Tensor", mask_T: "Tensor"
    ) -> "tuple[Tensor, Tensor]":
        """Return the loss and its gradient with respect to ``student_TV``.

        A member with a gradient in closed form overrides this to save passes over the vocabulary.
        """
        import torch

        with torch.enable_grad():
            student = student_TV.detach().requires_grad_()
            value = self(student, teacher_TV, mask_T)
            (gradient_TV,) = torch.autograd.grad(value, student)
        return value.detach(), gradient_TV
