"""Prune a checkpoint: fewer MLP channels, a narrower residual stream, fewer layers."""

import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field, PositiveInt, SerializeAsAny, model_validator
from typing_extensions import Self

from trt_kd.architectures import architecture_of
from trt_kd.architectures.shape import ModelShape, read_shape
from trt_kd.artifacts import Artifact, claim_work, work_directory, work_key, writing
from trt_kd.checkpoints import load_tokenizer
from trt_kd.config import StageConfig, build_plugin
from trt_kd.data.base import DataConfig, fingerprint, token_blocks
from trt_kd.errors import ConfigError
from trt_kd.pruning import AXES, IMPORTANCE
from trt_kd.pruning.base import Axis, Evidence, Importance
from trt_kd.pruning.budget import Budget, limited, untimed
from trt_kd.pruning.candidates import countable, possible
from trt_kd.pruning.catalogue import Target
from trt_kd.pruning.depth import DepthAxis
from trt_kd.pruning.importance import Activation
from trt_kd.pruning.passes import pass_bytes
from trt_kd.pruning.reconstruction import SHARES, Reconstruct, fold_bytes
from trt_kd.pruning.search import Search, open_axes
from trt_kd.pruning.sizes import check_axes, planned_shape
from trt_kd.stages.choosing import Trial, choose
from trt_kd.stages.confirming import in_time
from trt_kd.stages.corners import PruningDoesNotPayError
from trt_kd.stages.cutting import BATCH, cut_checkpoint

# On a twin of two layers the embeddings weigh most of the model: its share has to stay near one.
_REHEARSAL_SHARE = 0.97


class PruneConfig(StageConfig):
    """What to cut and on how much evidence."""

    stage: ClassVar[str] = "prune"
    version: ClassVar[int] = 3

    axes: Annotated[
        list[Annotated[SerializeAsAny[Axis], BeforeValidator(partial(build_plugin, AXES))]],
        Field(min_length=1),
    ]
    """What shrinks; all axes are scored on the unpruned model."""
    budget: Budget | None = None
    """Limits, such as ``{params: 80%}``, that settle the axes left without a size."""
    target: Target = Target()
    """Format, runtime, GPU and tensor-parallel size that every size has to be legal for."""
    importance: Annotated[
        SerializeAsAny[Importance], BeforeValidator(partial(build_plugin, IMPORTANCE))
    ] = Activation()
    """How channels are ranked; layers are ranked by the importance of the depth axis."""
    reconstruct: Reconstruct | None = Reconstruct()
    """Refit what reads the cut units; null keeps the plain cut."""
    search: Search | None = None
    """How the sizes of several open axes are chosen; its defaults where left out."""
    rounds: PositiveInt = 1
    """Cuts in which the sizes are reached, each scored and refit anew; worth it below half."""
    calibration_tokens: PositiveInt = 16_384
    """Tokens of the training split behind scores and refit, in whole blocks."""
    data: DataConfig = DataConfig()
    """Calibration text."""
    seed: int = 0
    """Seeds the choice of text, and an importance that draws numbers."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        try:
            check_axes(self.axes, self.budget)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        if "channels" not in self.importance.units:
            raise ValueError(f"importance {self.importance.kind!r} does not rank channels")
        if self.importance != Activation() and not any(
            axis.unit == "channels" for axis in self.axes
        ):
            raise ValueError("importance ranks channels, and no axis cuts any; leave it out")
        if self.reconstruct is not None:
            try:
                self.reconstruct.check(axis.kind for axis in self.axes)
            except ConfigError as error:
                raise ValueError(f"{error}: {error.hint}") from error
        self._check_search()
        return self

    def _check_search(self) -> None:
        count = len(open_axes(self.axes))
        if self.search is not None and count < 2:
            raise ValueError("search has no effect: fewer than two axes are left without a size")
        if count > 1 and any(axis.unit == "tokens" for axis in self.axes):
            raise ValueError("a search compares models of one vocabulary: cut vocab on its own")

    @property
    def searching(self) -> Search | None:
        """How to search, if there is anything to search for."""
        if len(open_axes(self.axes)) < 2:
            return None
        return self.search or Search()

    @property
    def is_timed(self) -> bool:
        """Whether the budget limits time."""
        return self.budget is not None and self.budget.latency is not None

    def outside(self) -> dict[str, str]:
        """Fingerprint of the calibration text."""
        return self.data.outside()

    def rehearsal(self) -> Self:
        """Two blocks, axes that suit a model of two layers, and a search among two candidates."""
        tokens = 2 * self.data.block_tokens
        search = self.searching and self.searching.rehearsed(tokens)
        axes = self.axes if search else [axis.rehearsed() for axis in self.axes]
        still_open = any(axis.is_open for axis in axes)
        return self.model_copy(
            update={
                "axes": axes,
                "budget": _rehearsed(self.budget) if still_open else None,
                "calibration_tokens": tokens,
                "search": search,
            }
        )

    def planned(self, shape: ModelShape) -> ModelShape:
        """Shape after pruning a model of ``shape``; needs no torch.

        What a search will choose is not known before: then it is that of the candidate that uses
        the budget best. Limits on time have no say here; alone they count as a share of parameters.

        Raises:
            ConfigError: if the axes contradict each other.
            ModelError: if the architecture is not supported or has no such size.
        """
        architecture = architecture_of(shape.model_type)
        for axis in self.axes:
            architecture.check_axis(axis.kind, shape)
        budget = self.budget and countable(self.budget, self.axes, shape, self.target)
        if budget is not None and self.searching:
            return possible(self.axes, shape, budget, self.target)[0].shape
        return planned_shape(self.axes, budget, shape, self.target)

    def memory_bytes(self, shape: ModelShape) -> int:
        """Memory of pruning a model of ``shape``: float32 weights, the largest pass, refit."""
        passes = [
            pass_bytes(shape, evidence, batch=BATCH, tokens=self.data.block_tokens)
            for evidence in self._evidence()
        ]
        weights = 4 * shape.parameters
        if self.searching:
            weights += 2 * self.searching.check_tokens * shape.vocab  # what candidates are held to
        return weights + max(passes) + self._refit_bytes(shape)

    def _evidence(self) -> set[Evidence]:
        """What the passes over the calibration text have to show."""
        asked: set[Evidence] = {"states"}  # the hooked pass is always made
        for axis in self.axes:
            if axis.unit == "channels":
                asked.add(self.importance.evidence)
            elif isinstance(axis, DepthAxis) and axis.drop is None:
                asked.add(axis.importance.evidence)
        return asked

    def _refit_bytes(self, shape: ModelShape) -> int:
        """Gram matrices; of a sequential refit both streams, the next one, one set of inputs."""
        if self.reconstruct is None:
            return 0
        cut = {
            axis.kind: axis.read(shape) if axis.is_open else axis.target(shape)
            for axis in self.axes
            if axis.is_open or axis.target(shape) < axis.read(shape)
        }
        if self.reconstruct.schedule == "once":
            readers = _reader_bytes(shape) if "hidden" in cut else 0
            return self.reconstruct.memory_bytes(_refit_widths(shape, cut)) + readers
        width = max([shape.ffn, *_refit_widths(shape, cut)])
        tokens = self.data.block_tokens
        held = 4 * self.blocks() * tokens * (3 * shape.hidden + width)
        weights = 8 * shape.hidden * width
        if "depth" in cut:
            held += fold_bytes(shape, tokens)
            weights += 4 * len(SHARES) * shape.hidden * width
        return self.reconstruct.memory_bytes([width]) + held + weights

    def blocks(self) -> int:
        """Calibration blocks."""
        return -(-self.calibration_tokens // self.data.block_tokens)


def _refit_widths(shape: ModelShape, cut: Mapping[str, int]) -> list[int]:
    """Sides of the Gram matrices of all that is refit, as it runs; ``cut`` are sizes by axis."""
    stream = [shape.hidden + cut["hidden"]] if "hidden" in cut else []
    heads = [shape.heads * shape.head_dim] if {"heads", "kv_heads"} & cut.keys() else []
    experts = [math.ceil(shape.experts**0.5 * shape.expert_ffn)] if "expert_ffn" in cut else []
    mlp = [shape.ffn] if "ffn" in cut and shape.ffn else []
    head = stream if not shape.tied else []
    return (stream + heads + stream + experts + mlp) * shape.layers + head


def _reader_bytes(shape: ModelShape) -> int:
    """Weights that read the stream at one point, in two orders, and the solution."""
    attention = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    mlp = 2 * max(shape.ffn, shape.experts * shape.expert_ffn)
    rows = max(attention, mlp, 0 if shape.tied else shape.vocab)
    return 4 * rows * 4 * shape.hidden


def _rehearsed(budget: Budget | None) -> Budget:
    """A budget that almost everything keeps, with limits on time if there were any."""
    limit = budget.latency if budget is not None else None
    if limit is None:
        return Budget(params=_REHEARSAL_SHARE)
    easy = {"itl_ms": "1000%", "ttft_ms": None, "tokens_per_s": None, "min_speedup": 0.01}
    easy |= {"input_tokens": None, "output_tokens": None}
    return Budget(params=_REHEARSAL_SHARE, latency=limit.model_copy(update=easy))


def prune(
    config: PruneConfig,
    *,
    source: Artifact,
    out: Path,
    scores: Artifact | None = None,
    latency: Artifact | None = None,
) -> Artifact:
    """Turn checkpoint ``source`` into a smaller checkpoint at ``out``.

    Scores in float32, stores in the source's dtype. With several open axes the candidates are
    ranked by ``scores`` (see the score stage), the best ones are made and measured, and the winner
    is kept; what is measured survives a kill.

    Raises:
        ConfigError: if scores are missing for a search.
        PruningDoesNotPayError: if a format alone keeps the limits on time.
        TrtKdError: if the model, the sizes or the text are unfit.
    """
    shape = read_shape(source.path)
    config.planned(shape)  # refuses impossible sizes before anything is made
    given = {"source": source, "scores": scores, "latency": latency}
    inputs = {role: artifact for role, artifact in given.items() if artifact is not None}
    _check_timed(config, latency)
    if config.searching and scores is None:
        names = ", ".join(axis.kind for axis in open_axes(config.axes))
        raise ConfigError(
            f"{len(open_axes(config.axes))} axes without a size need scores to choose by",
            hint=f"trt-kd score --source {source.path} --out SCORES 'axes=[{names}]', "
            "then trt-kd search --scores SCORES",
        )
    if scores is not None:
        check_scores(config, scores, source)
    with writing(out, kind="checkpoint", config=config, inputs=inputs) as draft:
        blocks = token_blocks(
            config.data,
            load_tokenizer(source.path),
            split="train",
            count=config.blocks(),
            seed=config.seed,
        )
        draft.metrics["calibration_fingerprint"] = fingerprint(blocks)
        key = work_key(config, {role: artifact.key for role, artifact in inputs.items()})
        if config.searching and scores is not None:
            with _work(out, key) as work:
                trial = Trial(config, source, shape, blocks, scores.path, work, latency)
                draft.metrics |= choose(trial, draft.path)
        else:
            if latency is not None:
                with _work(out, key) as work:
                    config, draft.metrics["latency"] = in_time(config, latency, source, work)
            folder = scores.path if scores is not None else None
            draft.metrics |= cut_checkpoint(config, source.path, blocks, draft.path, scores=folder)
    return Artifact.open(out, expect="checkpoint")


@contextmanager
def _work(out: Path, key: str) -> Iterator[Path]:
    """The work folder; where there is nothing to prune for, none is left to be resumed."""
    try:
        yield claim_work(work_directory(out), key)
    except PruningDoesNotPayError:
        shutil.rmtree(work_directory(out))
        raise


def _check_timed(config: PruneConfig, latency: Artifact | None) -> None:
    if latency is not None:
        limited(config.budget)
    elif config.is_timed:
        raise untimed()


def check_scores(config: PruneConfig, scores: Artifact, source: Artifact) -> None:
    """Check that ``scores`` are of ``source``, by the same importance, on the same text.

    On other text they could have seen what candidates are measured on.

    Raises:
        ConfigError: if they are not.
    """
    wanted = config.model_dump(mode="json")
    for name in ("importance", "calibration_tokens", "data", "seed"):
        was, asked = scores.manifest.config.get(name), wanted[name]
        if was != asked:
            raise ConfigError(
                f"the scores in {scores.path} were made with {name} {was}, not {asked}",
                hint="make them anew with the settings of the pruning, or prune with theirs",
            )
    if scores.manifest.inputs.get("source") != source.key:
        raise ConfigError(
            f"the scores in {scores.path} are of another model than {source.path}",
            hint="make scores of this one with trt-kd score",
        )
