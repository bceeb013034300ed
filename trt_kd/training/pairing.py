"""Which layer of the student is compared with which of the teacher; layers count from 0."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from typing_extensions import Self

from trt_kd.config import StrictModel
from trt_kd.data.base import DataConfig
from trt_kd.errors import ConfigError

Pair = tuple[int, int]
"""A layer of the student and one of the teacher."""

WEAK_SHARE = 0.9
"""A pair is weak below this share of the best similarity that its student layer has."""


class Pairing(StrictModel):
    """A rule that pairs layers, or the pairs themselves."""

    pairs: Annotated[
        Literal["proportional", "kept", "cka"]
        | Annotated[list[tuple[NonNegativeInt, NonNegativeInt]], Field(min_length=1)],
        Field(union_mode="left_to_right"),
    ] = "proportional"
    """``proportional``: layer i with floor(i * teacher's depth / student's depth); ``kept``: with
    the layer it was before pruning; ``cka``: with the most similar one, measured on training text;
    or pairs ``[[student, teacher], ...]``."""
    count: PositiveInt | None = None
    """Layers of the student that a rule pairs, evenly spread, the last among them; a sixth of
    them, from 3 to 6, if left out."""

    @model_validator(mode="after")
    def _pairs_are_one_thing(self) -> Self:
        if isinstance(self.pairs, list):
            if self.count is not None:
                raise ValueError("count has no effect: the pairs are given one by one")
            if len(set(self.pairs)) < len(self.pairs):
                raise ValueError("a pair stands twice")
        return self

    def layers(self, depth: int) -> list[int]:
        """Layers of a student of ``depth`` layers that the rule pairs.

        Raises:
            ConfigError: if it has fewer than are to be paired.
        """
        count = self.count or default_count(depth)
        if count > depth:
            raise ConfigError(
                f"features: {count} layers are to be paired and the student has {depth}",
                hint=f"set count to at most {depth}",
            )
        return spread(depth, count)


class Comparison(Pairing):
    """What ``trt-kd layers`` measures on, and which pairs it judges."""

    data: DataConfig = DataConfig()
    """Text of the models' training."""


def default_count(depth: int) -> int:
    """A sixth of the layers, from 3 to 6, and no more than there are."""
    return min(depth, max(3, min(6, depth // 6)))


def spread(depth: int, count: int) -> list[int]:
    """``count`` of ``depth`` layers at even distances, the last one among them."""
    return [(number + 1) * depth // count - 1 for number in range(count)]


def paired(pairing: Pairing, depths: Pair, kept: Sequence[int] | None) -> list[Pair]:
    """The pairs of every rule but ``cka``.

    Args:
        pairing: the rule, or the pairs, which are checked.
        depths: layers of the student and of the teacher.
        kept: the teacher's layers that pruning kept, as its manifest tells; None if it does not.

    Raises:
        ConfigError: if a pair is out of range, or the kept layers are not known.
        ValueError: if the rule has to be measured.
    """
    student, teacher = depths
    if isinstance(pairing.pairs, list):
        return _in_range(pairing.pairs, depths)
    if pairing.pairs == "proportional":
        return [(layer, layer * teacher // student) for layer in pairing.layers(student)]
    if pairing.pairs == "kept":
        known = _kept(kept, depths)
        return [(layer, known[layer]) for layer in pairing.layers(student)]
    raise ValueError("pairs by similarity have to be measured")


def _in_range(pairs: list[Pair], depths: Pair) -> list[Pair]:
    for pair in pairs:
        for layer, depth, whose in zip(pair, depths, ("student", "teacher"), strict=True):
            if layer >= depth:
                raise ConfigError(
                    f"features: the pair {list(pair)} asks for layer {layer} of the {whose}, "
                    f"which has {depth}",
                    hint=f"layers count from 0: write 0 to {depth - 1}, student first",
                )
    return pairs


def _kept(kept: Sequence[int] | None, depths: Pair) -> Sequence[int]:
    student, teacher = depths
    if kept is None and student == teacher:
        return range(teacher)
    if kept is None or len(kept) != student or max(kept) >= teacher:
        found = "does not say which layers were kept" if kept is None else f"kept {list(kept)}"
        raise ConfigError(
            f"features: pairs: kept does not fit: the student's manifest {found}; it has "
            f"{student} layers and the teacher {teacher}",
            hint="give what prune made of this teacher, or set pairs to proportional or cka",
        )
    return kept


def most_similar(pairing: Pairing, similarity: Sequence[Sequence[float]]) -> list[Pair]:
    """The pairs of greatest similarity in all whose teacher layers never go back.

    ``similarity`` has a row for every layer of the student and a column for every one of the
    teacher. Of equal choices the earliest is taken.
    """
    layers, width = pairing.layers(len(similarity)), len(similarity[0])
    best = [0.0] * width
    ways: list[list[int]] = [[] for _ in range(width)]
    for layer in layers:
        tops = _running_best(best)
        ways = [[*ways[tops[column]], column] for column in range(width)]
        best = [best[tops[column]] + similarity[layer][column] for column in range(width)]
    return list(zip(layers, ways[_running_best(best)[-1]], strict=True))


def _running_best(values: Sequence[float]) -> list[int]:
    """For every place the first place of the greatest value up to it."""
    tops = [0]
    for place in range(1, len(values)):
        tops.append(place if values[place] > values[tops[-1]] else tops[-1])
    return tops


@dataclass(frozen=True)
class Judged:
    """A pair with its similarity, beside the best that its student layer has."""

    student: int
    teacher: int
    cka: float
    best_teacher: int
    best_cka: float

    @property
    def weak(self) -> bool:
        """The rule ``weak_pair``: its similarity is under 0.9 of the best one."""
        return self.cka < WEAK_SHARE * self.best_cka


def judged(pairs: Sequence[Pair], similarity: Sequence[Sequence[float]]) -> list[Judged]:
    """Every pair against the best in its row of ``similarity``."""
    found = []
    for student, teacher in pairs:
        row = list(similarity[student])
        best = max(range(len(row)), key=row.__getitem__)
        found.append(Judged(student, teacher, row[teacher], best, row[best]))
    return found
