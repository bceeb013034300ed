"""Sensitivity: quantize each decoder layer alone, in each format, and see what that costs."""

import json
from collections.abc import Mapping
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, PositiveInt, field_validator
from typing_extensions import Self

from trt_kd.architectures import architecture_of
from trt_kd.architectures.shape import ModelShape, read_shape
from trt_kd.artifacts import Artifact, claim_work, piece, work_directory, work_key, writing
from trt_kd.checkpoints import load_model, load_tokenizer
from trt_kd.config import StageConfig, plugin_field
from trt_kd.data.base import DataConfig, fingerprint, token_blocks
from trt_kd.errors import ModelError
from trt_kd.measuring.progress import progress
from trt_kd.quantization import FORMATS
from trt_kd.quantization.base import QuantizationFormat, label

if TYPE_CHECKING:
    import numpy as np

    from trt_kd.quantization.sensitivity import Original

FILE, TABLE, FIGURE = "sensitivity.json", "sensitivity.md", "sensitivity.svg"


class SensitivityConfig(StageConfig):
    """Which formats, and the text behind scales and costs."""

    stage: ClassVar[str] = "sensitivity"

    formats: Annotated[
        list[plugin_field(FORMATS, QuantizationFormat)],  # type: ignore[valid-type]
        Field(min_length=1),
    ]
    """Formats to compare, with their options."""
    data: DataConfig = DataConfig()
    """Text: its training split calibrates, costs are measured on its held-out split."""
    calibration_tokens: PositiveInt = 8192
    """Tokens behind the scales, rounded up to whole blocks."""
    heldout_blocks: PositiveInt = 4
    """Held-out blocks that every cost is measured on."""
    seed: int = 0
    """Order of the documents."""

    @field_validator("formats")
    @classmethod
    def _different(cls, formats: list[QuantizationFormat]) -> list[QuantizationFormat]:
        names = [label(quantization) for quantization in formats]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{twice[0]} stands twice: name every format once")
        return formats

    def outside(self) -> dict[str, str]:
        """Fingerprints of the text."""
        return self.data.outside()

    def rehearsal(self) -> Self:
        """Calibrate on two blocks and measure on one."""
        tokens = min(self.calibration_tokens, 2 * self.data.block_tokens)
        return self.model_copy(update={"calibration_tokens": tokens, "heldout_blocks": 1})

    def cells(self, shape: ModelShape) -> list[tuple[QuantizationFormat, int | None]]:
        """Every format with every layer of a model of ``shape``; None is all layers together."""
        layers: list[int | None] = [*range(shape.layers), None]
        return [(quantization, layer) for quantization in self.formats for layer in layers]

    def tokens(self, shape: ModelShape) -> int:
        """Tokens that pass through a model of ``shape``; searches for scales are not counted."""
        heldout = self.heldout_blocks * self.data.block_tokens
        calibrations = len(self.formats) * self.calibration_tokens
        return heldout * (1 + len(self.cells(shape))) + calibrations

    def memory_bytes(self, shape: ModelShape) -> int:
        """Memory of the model, its quantized twin and the predictions held, in float32."""
        heldout = self.heldout_blocks * self.data.block_tokens
        return 4 * (2 * shape.parameters + 2 * heldout * shape.vocab)

    def check(self, directory: Path) -> ModelShape:
        """Shape of the model in ``directory``, if every format fits it.

        Raises:
            ModelError: naming every problem of every format.
        """
        shape = read_shape(directory)
        problems = [
            f"{label(quantization)}: {problem}"
            for quantization in self.formats
            for problem in quantization.check(shape)
        ]
        if problems:
            lines = "".join(f"\n  {problem}" for problem in problems)
            raise ModelError(f"{directory} does not fit every format:{lines}")
        return shape


def sensitivity(config: SensitivityConfig, *, source: Artifact, out: Path) -> Artifact:
    """Measure checkpoint ``source``; table, figure and numbers are written to ``out``.

    Every measured cell survives a kill.

    Raises:
        ArtifactError: if ``source`` is no checkpoint.
        ModelError: if a format does not fit the model, or a scale is missing, zero or infinite.
    """
    from trt_kd.reporting.sensitivity_figure import draw_sensitivity, sensitivity_table

    source = Artifact.open(source.path, expect="checkpoint")
    shape = config.check(source.path)
    with writing(out, kind="sensitivity", config=config, inputs={"source": source}) as draft:
        work = claim_work(work_directory(out), work_key(config, {"source": source.key}))
        subject = _Subject(config, source.path)
        costs: dict[str, list[list[float]]] = {label(one): [] for one in config.formats}
        for quantization, layer in progress(config.cells(shape), "measuring layers"):
            costs[label(quantization)].append(subject.cost(quantization, layer, work))
        found = {name: _summary(cells) for name, cells in costs.items()}
        text = json.dumps({"schema_version": 1, "formats": found}, indent=2)
        (draft.path / FILE).write_text(text + "\n", encoding="utf-8")
        (draft.path / TABLE).write_text(sensitivity_table(found), encoding="utf-8")
        draw_sensitivity(found, draft.path / FIGURE)
        draft.metrics |= {
            "heldout_tokens": config.heldout_blocks * config.data.block_tokens,
            "calibration_fingerprint": fingerprint(subject.calibration),
            "layer_kl_nats": {name: one["layer_kl_nats"] for name, one in found.items()},
            "whole_kl_nats": {name: one["whole_kl_nats"] for name, one in found.items()},
        }
    return Artifact.open(out, expect="sensitivity")


def _summary(cells: list[list[float]]) -> dict[str, Any]:
    """Means over the blocks; the last cell is all layers together."""
    means = [sum(blocks) / len(blocks) for blocks in cells]
    return {
        "layer_kl_nats": means[:-1],
        "whole_kl_nats": means[-1],
        "layer_kl_nats_by_block": cells[:-1],
        "whole_kl_nats_by_block": cells[-1],
    }


class _Subject:
    """The model and its twin in the format at hand; both are made when a cell first asks."""

    def __init__(self, config: SensitivityConfig, source: Path) -> None:
        self._config, self._source = config, source
        self._twin: tuple[QuantizationFormat, Any] | None = None

    def cost(self, quantization: QuantizationFormat, layer: int | None, work: Path) -> list[float]:
        """Mean KL in nats per token of every held-out block, unless it was measured before."""

        def make(_: Path) -> dict[str, Any]:
            original, twin = self._original, self._in(quantization)
            if layer is None:
                return {"kl_nats": original.divergence(twin)}
            return {"kl_nats": original.with_layer(self._layers(twin), layer)}

        number = self._config.formats.index(quantization)
        name = "whole" if layer is None else f"layer-{layer}"
        found: Mapping[str, list[float]] = piece(work / f"{number}-{name}", make)
        return found["kl_nats"]

    @cached_property
    def calibration(self) -> "np.ndarray":
        """Token ids ``[N, L]`` to calibrate on."""
        return self._text("train", ceil(self._config.calibration_tokens / self._block_tokens))

    @property
    def _block_tokens(self) -> int:
        return self._config.data.block_tokens

    def _text(self, split: Any, count: int) -> "np.ndarray":
        tokenizer, seed = load_tokenizer(self._source), self._config.seed
        return token_blocks(self._config.data, tokenizer, split=split, count=count, seed=seed)

    @cached_property
    def _original(self) -> "Original":
        from trt_kd.quantization.sensitivity import Original

        model = self._loaded()
        heldout_NL = self._text("heldout", self._config.heldout_blocks)
        return Original(model, self._layers(model), heldout_NL)

    def _in(self, quantization: QuantizationFormat) -> Any:
        """The model in one format; the one before is freed first."""
        from trt_kd.quantization.calibration import calibrate

        if self._twin is None or self._twin[0] != quantization:
            self._twin = None
            model = self._loaded()
            calibrate(model, quantization, self.calibration)
            self._twin = quantization, model
        return self._twin[1]

    def _loaded(self) -> Any:
        from trt_kd.stages.cutting import on_accelerator

        return on_accelerator(load_model(self._source, dtype="float32"))

    @staticmethod
    def _layers(model: Any) -> Any:
        return architecture_of(model.config.model_type).layers(model)
