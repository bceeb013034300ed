"""Minifinetuning.

Source: Belcak et al. 2025, MFT (arXiv:2506.15702); ModelOpt's ``MFTLoss`` is the same loss.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat

from trt_kd.losses.closed_form import ClosedForm, Form


class Minifinetuning(ClosedForm):
    r"""Forward KL to a teacher that is corrected where it is wrong about the true next token.

    :math:`\tau^2 \sum_t D_{KL}(p^*_t \| q_t)`: :math:`p^*` mixes so much of the label into the
    teacher that it leads the teacher's likeliest token by ``threshold``; where it is that token, it
    gains ``threshold``. The student learns the text and keeps the teacher's view of all other
    tokens; one that equals the teacher is not at the minimum.
    """

    needs_labels: ClassVar[bool] = True
    zero_at_agreement: ClassVar[bool] = False

    kind: Literal["mft"] = "mft"
    """Name in the registry."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Lead of the label over the teacher's likeliest token, as a probability."""
    temperature: PositiveFloat = 1.0
    """Softens both distributions; the loss is scaled by its square to keep gradient size."""

    def form(self) -> Form:
        """See the base class."""
        from trt_kd.losses.labelled import minifinetuning, minifinetuning_gradient

        options = {"threshold": self.threshold, "temperature": self.temperature}
        return Form(minifinetuning, minifinetuning_gradient, options)

    def top_k_problem(self) -> str | None:
        """See the base class; a label in the tail has no probability of its own there."""
        return f"{self.kind} needs the teacher's probability of every true token"
