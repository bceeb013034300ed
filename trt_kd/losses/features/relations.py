"""Losses between the relations that the tokens of a sequence have to each other.

Sources: Passalis and Tefas 2018, PKT (arXiv:1803.10837); Yim et al. 2017, FSP
(doi:10.1109/CVPR.2017.754) and Tung and Mori 2019 (arXiv:1907.09682) for Gram matrices; Park et al.
2019, RKD (arXiv:1904.05068); Wang et al. 2020, MiniLM (arXiv:2002.10957), and 2021, MiniLM v2
(arXiv:2012.15828).
"""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from trt_kd.losses.features.base import Reading, SequenceLoss

if TYPE_CHECKING:
    from torch import Tensor


class ProbabilisticTransfer(SequenceLoss):
    r"""KL between the chances with which a token would choose each other token as its neighbour.

    The chances go with :math:`(1 + \cos(x_i, x_j)) / 2`, a token itself left out.
    """

    least: ClassVar[int] = 3

    kind: Literal["pkt"] = "pkt"
    """Name in the registry."""

    def sequence(self, student_ND: "Tensor", teacher_ND: "Tensor") -> "Tensor":
        """See the base class."""
        from trt_kd.losses.features.maths import neighbour_divergence

        return neighbour_divergence(student_ND, teacher_ND)


class Gram(SequenceLoss):
    r"""Squared distance of the Gram matrices of a sequence, every row divided by its norm.

    Over tokens, ``[N, N]``, as in similarity-preserving distillation, so that widths may differ;
    FSP's is over the channels of two layers. The mean is over the N rows; the paper's is over all
    N² entries.
    """

    least: ClassVar[int] = 2

    kind: Literal["gram"] = "gram"
    """Name in the registry."""

    def sequence(self, student_ND: "Tensor", teacher_ND: "Tensor") -> "Tensor":
        """See the base class."""
        from torch.nn import functional

        student_NN, teacher_NN = (
            functional.normalize(x @ x.mT, dim=-1) for x in (student_ND, teacher_ND)
        )
        return (student_NN - teacher_NN).square().sum(-1).mean()


class RelationalDistance(SequenceLoss):
    r"""Huber loss between the distances of pairs of tokens, each over its side's mean distance."""

    least: ClassVar[int] = 2

    kind: Literal["rkd_distance"] = "rkd_distance"
    """Name in the registry."""
    tokens: Annotated[int, Field(ge=2)] = 128
    """Tokens of a sequence, evenly spaced, among which pairs are formed."""

    def sequence(self, student_ND: "Tensor", teacher_ND: "Tensor") -> "Tensor":
        """See the base class."""
        from torch.nn import functional

        from trt_kd.losses.features.maths import evenly, relative_distances

        student, teacher = (
            relative_distances(evenly(x, self.tokens)) for x in (student_ND, teacher_ND)
        )
        return functional.smooth_l1_loss(student, teacher)


class RelationalAngle(SequenceLoss):
    r"""Huber loss between the cosines of the angles that triples of tokens span."""

    least: ClassVar[int] = 3

    kind: Literal["rkd_angle"] = "rkd_angle"
    """Name in the registry."""
    tokens: Annotated[int, Field(ge=3)] = 32
    """Tokens of a sequence, evenly spaced, among which triples are formed."""

    def sequence(self, student_ND: "Tensor", teacher_ND: "Tensor") -> "Tensor":
        """See the base class."""
        from torch.nn import functional

        from trt_kd.losses.features.maths import angles, evenly

        student, teacher = (angles(evenly(x, self.tokens)) for x in (student_ND, teacher_ND))
        return functional.smooth_l1_loss(student, teacher)


class MiniLM(SequenceLoss):
    r"""KL between self-attention relations: what queries, keys or values attend to among their own.

    :math:`\mathrm{softmax}(x x^\top / \sqrt{d})` over all heads side by side, cut anew into
    ``heads`` relation heads, so that the numbers of heads may differ: MiniLM v2. Queries and keys
    are as attention takes them: normalized and rotated where the model does so.
    """

    kind: Literal["minilm"] = "minilm"
    """Name in the registry."""
    relations: Annotated[
        tuple[Literal["queries", "keys", "values"], ...], Field(min_length=1, max_length=3)
    ] = ("queries", "keys", "values")
    """Which relations are summed."""
    heads: PositiveInt = 8
    """Relation heads; divides the width of every reading on both sides."""
    causal: bool = True
    """Whether a token relates to earlier ones and itself only, as in its model; the papers' see
    all."""

    @property
    def reads(self) -> tuple[Reading, ...]:
        """See the base class."""
        return tuple(dict.fromkeys(self.relations))

    def problem(self, student_width: int, teacher_width: int) -> str | None:
        """See the base class."""
        for width in (student_width, teacher_width):
            if width % self.heads:
                return f"minilm's {self.heads} relation heads do not divide the width {width}"
        return None

    def sequence(self, student_ND: "Tensor", teacher_ND: "Tensor") -> "Tensor":
        """See the base class."""
        from trt_kd.losses.features.maths import relation_divergence

        return relation_divergence(student_ND, teacher_ND, self.heads, causal=self.causal)


class MiniLMv1(SequenceLoss):
    r"""KL between the attention of both models, plus KL between the relations of their values.

    Attention is :math:`\mathrm{softmax}(q k^\top)` with the model's own scale, head by head: both
    models need the same number of heads, widths may differ. It is causal; a window or a cap on its
    scores is not read.
    """

    kind: Literal["minilm_v1"] = "minilm_v1"
    """Name in the registry."""
    heads: PositiveInt = 8
    """Attention heads of both models."""

    @property
    def reads(self) -> tuple[Reading, ...]:
        """See the base class."""
        return ("attention",)

    @property
    def attention_heads(self) -> int | None:
        """See the base class."""
        return self.heads

    def problem(self, student_width: int, teacher_width: int) -> str | None:
        """See the base class."""
        for width in (student_width, teacher_width):
            if width % (3 * self.heads):
                return f"minilm_v1's {self.heads} heads do not divide the width {width // 3}"
        return None

    def sequence(self, student_ND: "Tensor", teacher_ND: "Tensor") -> "Tensor":
        """See the base class."""
        from trt_kd.losses.features.maths import attention_divergence

        return attention_divergence(student_ND, teacher_ND, self.heads)
