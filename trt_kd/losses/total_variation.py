"""Total variation distillation.

Sources: Wen et al. 2023, f-DISTILL (arXiv:2307.15190); Leviathan et al. 2023 (arXiv:2211.17192)
for what it means to speculative decoding.
"""

from typing import ClassVar, Literal

from trt_kd.losses.closed_form import ClosedForm, Form


class TotalVariation(ClosedForm):
    r"""Half of the L1 distance between teacher p and student q.

    :math:`\frac12 \sum_t \sum_v |p_{tv} - q_{tv}|`, from 0 to 1 per token and no nats: the chance
    that speculative decoding with the teacher rejects a token that the student drafts. It has no
    temperature, since its size near agreement does not go with the square of one. The gradient is
    a subgradient: it does not fade near agreement, and where a token's probabilities are equal 0 is
    taken.
    """

    smooth: ClassVar[bool] = False
    f_divergence: ClassVar[bool] = True

    kind: Literal["total_variation"] = "total_variation"
    """Name in the registry."""

    def form(self) -> Form:
        """See the base class."""
        from trt_kd.losses.divergences import total_variation, total_variation_gradient

        return Form(total_variation, total_variation_gradient, {})
