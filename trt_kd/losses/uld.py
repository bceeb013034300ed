"""Universal logit distillation, for vocabularies that have nothing to do with each other.

Source: Boizard et al. 2024 (arXiv:2402.12030), the closed form of their Wasserstein distance.
"""

from typing import ClassVar, Literal

from trt_kd.losses.closed_form import ClosedForm, Form


class UniversalLogit(ClosedForm):
    r"""Sum of :math:`|p_{(k)} - q_{(k)}|` over ranks k, probabilities sorted from large to small.

    From 0 to 2 per token and no nats. Which token is which does not matter, so that teacher p and
    student q may have any vocabularies: the shorter list goes on with zeros. Zero where one is a
    permutation of the other. The gradient is a subgradient, with 0 where two ranks are equal.
    """

    smooth: ClassVar[bool] = False
    any_vocabulary: ClassVar[bool] = True

    kind: Literal["uld"] = "uld"
    """Name in the registry."""

    def form(self) -> Form:
        """See the base class."""
        from trt_kd.losses.divergences import sorted_gap, sorted_gap_gradient

        return Form(sorted_gap, sorted_gap_gradient, {})

    def top_k_problem(self) -> str | None:
        """See the base class; the tail's ranks are not known from its mass."""
        return f"{self.kind} needs the teacher's whole distribution"
