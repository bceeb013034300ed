"""Score a model once for every later search: what each part is worth, what each cut costs."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, PositiveInt, SerializeAsAny, model_validator
from typing_extensions import Self

from trt_kd.architectures import architecture_of
from trt_kd.architectures.shape import ModelShape, read_shape
from trt_kd.artifacts import Artifact, claim_work, piece, work_directory, work_key, writing
from trt_kd.checkpoints import load_model, load_tokenizer
from trt_kd.config import StageConfig, build_plugin
from trt_kd.data.base import DataConfig, fingerprint, token_blocks
from trt_kd.measuring.progress import progress
from trt_kd.pruning import AXES, IMPORTANCE
from trt_kd.pruning.base import Axis, Importance
from trt_kd.pruning.importance import Activation
from trt_kd.pruning.reconstruction import Reconstruct
from trt_kd.pruning.search import open_axes
from trt_kd.pruning.sensitivity import Point, sizes_to_measure, write_points
from trt_kd.stages.cutting import on_accelerator, prune_model, score_model
from trt_kd.stages.prune import PruneConfig

if TYPE_CHECKING:
    from trt_kd.pruning.divergence import Reference


class ScoreConfig(StageConfig):
    """Which axes to score, on how much text."""

    stage: ClassVar[str] = "score"
    version: ClassVar[int] = 2

    axes: Annotated[
        list[Annotated[SerializeAsAny[Axis], BeforeValidator(partial(build_plugin, AXES))]],
        Field(min_length=1),
    ]
    """What a later search may shrink, sizes left out."""
    importance: Annotated[
        SerializeAsAny[Importance], BeforeValidator(partial(build_plugin, IMPORTANCE))
    ] = Activation()
    """How channels are ranked."""
    reconstruct: Reconstruct | None = Reconstruct()
    """Refit of the cuts that are measured; as in the pruning that is to come."""
    calibration_tokens: PositiveInt = 16_384
    """Tokens of the training split behind the scores, in whole blocks."""
    cut_tokens: PositiveInt = 8_192
    """The first ones of them serve the cuts that are measured."""
    check_tokens: PositiveInt = 4_096
    """Tokens behind those, on which cuts are measured."""
    points: Annotated[int, Field(ge=1, le=4)] = 3
    """Sizes of every axis that are measured."""
    data: DataConfig = DataConfig()
    """Calibration text."""
    seed: int = 0
    """Seeds the choice of text, and an importance that draws numbers."""

    @model_validator(mode="after")
    def _cuts_are_possible(self) -> Self:
        if len(open_axes(self.axes)) < len(self.axes):
            raise ValueError("scores serve every size: leave out the sizes of the axes")
        if any(axis.unit == "tokens" for axis in self.axes):
            raise ValueError("a search compares models of one vocabulary: leave out vocab")
        for axis in self.axes:
            self.cut(axis, 1)
        return self

    def cut(self, axis: Axis, size: int) -> PruneConfig:
        """Settings that cut ``axis`` alone to ``size``."""
        ranks = axis.unit == "channels"
        return PruneConfig(
            axes=[axis.resized(size)],
            importance=self.importance if ranks else Activation(),
            reconstruct=self.reconstruct,
            calibration_tokens=self.cut_tokens,
            data=self.data,
            seed=self.seed,
        )

    def outside(self) -> dict[str, str]:
        """Fingerprint of the calibration text."""
        return self.data.outside()

    def rehearsal(self) -> Self:
        """Two blocks of text everywhere, one size of every axis."""
        two = 2 * self.data.block_tokens
        return self.model_copy(
            update={"calibration_tokens": two, "cut_tokens": two, "check_tokens": two, "points": 1}
        )

    def blocks(self, tokens: int) -> int:
        """Blocks of so many tokens."""
        return -(-tokens // self.data.block_tokens)

    def cuts(self, shape: ModelShape) -> list[tuple[Axis, int]]:
        """Every axis and size that will be measured on a model of ``shape``."""
        return [
            (axis, size)
            for axis in self.axes
            for size in sizes_to_measure(axis, shape, self.points)
        ]

    def memory_bytes(self, shape: ModelShape) -> int:
        """Memory of the largest cut and of what cuts are held to."""
        cuts = [self.cut(axis, size).memory_bytes(shape) for axis, size in self.cuts(shape)]
        return max(cuts, default=4 * shape.parameters) + 2 * self.check_tokens * shape.vocab


def scoring_of(config: PruneConfig) -> ScoreConfig:
    """The scoring that the search of ``config`` stands on."""
    return ScoreConfig(
        axes=open_axes(config.axes),
        importance=config.importance,
        reconstruct=config.reconstruct,
        calibration_tokens=config.calibration_tokens,
        data=config.data,
        seed=config.seed,
    )


def score(config: ScoreConfig, *, source: Artifact, out: Path) -> Artifact:
    """Score checkpoint ``source`` and write scores and measured cuts to ``out``.

    A measured cut survives a kill.

    Raises:
        TrtKdError: if the model, the axes or the text are unfit.
    """
    import torch

    from trt_kd.pruning.divergence import Reference

    shape = read_shape(source.path)
    architecture = architecture_of(shape.model_type)
    for axis in config.axes:
        architecture.check_axis(axis.kind, shape)
    with writing(out, kind="scores", config=config, inputs={"source": source}) as draft:
        work = claim_work(work_directory(out), work_key(config, {"source": source.key}))
        text = _text(config, source.path)
        calibration = text[: config.blocks(config.calibration_tokens)]
        model = on_accelerator(load_model(source.path, dtype="float32"))
        scores, measured = score_model(config, model, calibration)
        scores.save(draft.path)
        reference = Reference(model, [*torch.from_numpy(text[len(calibration) :])])
        del model
        subject = _Subject(config, source.path, calibration, draft.path, reference)
        points = [
            subject.measured(axis, size, shape, work)
            for axis, size in progress(config.cuts(shape), "measuring cuts")
        ]
        write_points(points, draft.path)
        draft.metrics |= measured
        draft.metrics["sensitivity"] = [vars(point) for point in points]
        draft.metrics["calibration_fingerprint"] = fingerprint(calibration)
    return Artifact.open(out, expect="scores")


def _text(config: ScoreConfig, source: Path) -> NDArray[np.int64]:
    """Calibration blocks, and behind them those on which cuts are measured."""
    count = config.blocks(config.calibration_tokens) + config.blocks(config.check_tokens)
    tokenizer = load_tokenizer(source)
    return token_blocks(config.data, tokenizer, split="train", count=count, seed=config.seed)


@dataclass(frozen=True)
class _Subject:
    """What every cut is made from and measured with."""

    config: ScoreConfig
    source: Path
    calibration: NDArray[np.int64]
    scores: Path
    reference: "Reference"

    def measured(self, axis: Axis, size: int, shape: ModelShape, work: Path) -> Point:
        """Cut one axis of a fresh copy and see what that did, unless it was done before."""

        def make(_: Path) -> dict[str, Any]:
            model = on_accelerator(load_model(self.source, dtype="float32"))
            blocks = self.calibration[: self.config.blocks(self.config.cut_tokens)]
            prune_model(self.config.cut(axis, size), model, blocks, self.scores)
            return {"kl_nats": float(self.reference.divergence(model).mean())}

        found = piece(work / f"{axis.kind}-{size}", make)
        return Point(axis.kind, size, axis.read(shape), found["kl_nats"])
