"""Terms on features as a recipe has them, and what can be said of them before a model is loaded."""

import re
from collections.abc import Sequence

from pydantic import PositiveInt, model_validator
from typing_extensions import Self

from trt_kd.architectures.shape import ModelShape
from trt_kd.config import plugin_field
from trt_kd.errors import ConfigError
from trt_kd.losses import FEATURE_LOSSES, PROJECTORS
from trt_kd.losses.features.base import FeatureLoss, Normalisation, Projector, Reading
from trt_kd.losses.features.projectors import NoProjector
from trt_kd.training.pairing import Pair, Pairing, paired
from trt_kd.training.weights import Weight, over_whole_run, peak


class Feature(Pairing):
    """One loss on pairs of layers."""

    loss: plugin_field(FEATURE_LOSSES, FeatureLoss)  # type: ignore[valid-type]
    """How far what the two layers say is apart."""
    projector: plugin_field(PROJECTORS, Projector) = NoProjector()  # type: ignore[valid-type]
    """Map between the widths of both sides, one for each pair, trained with the student and left
    out of what is written."""
    normalise: Normalisation = "none"
    """What is done to the features, after the projector, before they are compared."""
    weight: Weight = 1.0
    """Factor of every pair's loss, or its schedule."""
    until_step: PositiveInt | None = None
    """Steps after which the term ends; none if left out."""
    alone: bool = False
    """Whether nothing else is learnt until then: a first stage of its own, as FitNets'."""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if not peak(self.weight):
            raise ValueError("weight 0 has no effect: leave the entry out")
        if self.alone and self.until_step is None:
            raise ValueError("alone needs until_step: nothing else would ever be learnt")
        if self.loss.reads != ("states",):
            for option, value in (
                ("projector", self.projector.kind),
                ("normalise", self.normalise),
            ):
                if value != "none":
                    raise ValueError(
                        f"{option} {value} does not fit {self.loss.kind}, which compares attention "
                        "and not states: leave it out"
                    )
        return self

    def name(self, pair: Pair) -> str:
        """Name of the term of one pair in the log."""
        kind = re.sub(r"\W+", "_", self.loss.kind)
        return f"feature_{kind}_{pair[0]}_{pair[1]}"

    def runs_at(self, step: int) -> bool:
        """Whether the term is part of the objective at ``step``, counted from 0."""
        return self.until_step is None or step < self.until_step

    def rehearsal(self) -> Self:
        """The same term between layers that a twin of two layers has, on both of its steps."""
        given = isinstance(self.pairs, list)
        pairing = {"pairs": "proportional"} if given else {}
        ends = {"until_step": 1} if self.until_step else {}
        weight = over_whole_run(self.weight)
        return self.model_copy(update={**pairing, **ends, "count": 1, "weight": weight})


def with_pairs(
    features: Sequence[Feature],
    student: ModelShape,
    teacher: ModelShape,
    kept: Sequence[int] | None,
) -> list[Feature]:
    """The terms with their pairs written out, but for those that have to be measured.

    Args:
        features: the terms as a recipe has them.
        student: its shape.
        teacher: its shape.
        kept: the teacher's layers that pruning kept, as the student's manifest tells.

    Raises:
        ConfigError: if layers are out of range, widths do not fit or a term stands twice.
    """
    found = []
    for feature in features:
        _check_widths(feature, student, teacher)
        if feature.pairs == "cka":
            feature.layers(student.layers)
            found.append(feature)
            continue
        pairs = paired(feature, (student.layers, teacher.layers), kept)
        found.append(with_given(feature, pairs))
    check_names(found)
    return found


def with_given(feature: Feature, pairs: list[Pair]) -> Feature:
    """The same term between these layers."""
    return feature.model_copy(update={"pairs": pairs, "count": None})


def check_names(features: Sequence[Feature]) -> None:
    """Check that no loss stands twice on the same pair.

    Raises:
        ConfigError: naming the pair.
    """
    seen: set[str] = set()
    for feature in features:
        for pair in feature.pairs if isinstance(feature.pairs, list) else []:
            if (name := feature.name(pair)) in seen:
                raise ConfigError(
                    f"features: {feature.loss.kind} stands twice on the pair {list(pair)}",
                    hint="give each entry other pairs, or one of them another weight",
                )
            seen.add(name)


def width(shape: ModelShape, reading: Reading) -> int:
    """Channels of what is read of a layer."""
    heads = {
        "queries": shape.heads,
        "keys": shape.kv_heads,
        "values": shape.kv_heads,
        "attention": 3 * shape.heads,
    }
    return shape.hidden if reading == "states" else heads[reading] * shape.head_dim


def _check_widths(feature: Feature, student: ModelShape, teacher: ModelShape) -> None:
    heads = feature.loss.attention_heads
    for role, shape in (("student", student), ("teacher", teacher)):
        if heads is not None and heads != shape.heads:
            raise ConfigError(
                f"features: {feature.loss.kind} compares {heads} attention heads, the {role} has "
                f"{shape.heads}",
                hint="set loss.heads to their number; where it differs between both take minilm",
            )
    for reading in feature.loss.reads:
        widths = width(student, reading), width(teacher, reading)
        if feature.projector.kind != "none":
            widths = widths[:1] * 2 if feature.projector.on_teacher else widths[1:] * 2
        if problem := feature.loss.problem(*widths):
            remedy = (
                "set projector: linear, mlp or orthogonal, or take a loss on relations"
                if feature.loss.same_width
                else "give it options that fit both models"
            )
            raise ConfigError(f"features: {problem}", hint=remedy)
