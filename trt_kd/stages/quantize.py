"""Quantize: calibrate a low-bit format with Model Optimizer and keep the fake-quantized model."""

from collections.abc import Mapping
from math import ceil
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import PositiveInt, model_validator
from typing_extensions import Self

from trt_kd.architectures.shape import ModelShape, read_shape
from trt_kd.artifacts import Artifact, work_directory, work_key, writing
from trt_kd.artifacts.manifest import Metric
from trt_kd.checkpoints import load_model, load_tokenizer
from trt_kd.config import StageConfig, plugin_field
from trt_kd.data.base import DataConfig, fingerprint, token_blocks
from trt_kd.errors import ModelError
from trt_kd.quantization import FORMATS
from trt_kd.quantization.base import QuantizationFormat
from trt_kd.quantization.mixed import Mixed
from trt_kd.stages.distill import DistillConfig
from trt_kd.stages.quantized_training import begin, option_problem, train_quantized, write_log
from trt_kd.training.history import training_metrics

if TYPE_CHECKING:
    import numpy as np

    from trt_kd.exporters.comparison import Difference


class QuantizeConfig(StageConfig):
    """The format, and the text its scales come from."""

    stage: ClassVar[str] = "quantize"
    version: ClassVar[int] = 2

    format: plugin_field(FORMATS, QuantizationFormat)  # type: ignore[valid-type]
    """The number format and its options."""
    data: DataConfig = DataConfig()
    """Text: its training split calibrates, its held-out split measures the loss."""
    calibration_tokens: PositiveInt = 8192
    """Tokens behind the scales, rounded up to whole blocks."""
    heldout_blocks: PositiveInt = 4
    """Held-out blocks to compare with the source."""
    train: DistillConfig | None = None
    """Train the model in its quantizers after they are calibrated, taught by what it was before
    (or by the text's own labels, with ``task_weight: 1`` and ``response_weight: 0``)."""
    seed: int = 0
    """Order of the documents."""

    @model_validator(mode="before")
    @classmethod
    def _training_reads_the_same_text(cls, values: Any) -> Any:
        """Give ``data`` and ``seed`` to a training that does not set its own."""
        train = values.get("train") if isinstance(values, Mapping) else None
        if not isinstance(train, Mapping):
            return values
        shared = {name: values[name] for name in ("data", "seed") if name in values}
        return {**values, "train": shared | dict(train)}

    @model_validator(mode="after")
    def _can_be_trained(self) -> Self:
        problem = self.train and option_problem(self.train, self.format)
        if problem:
            raise ValueError(f"train: {problem}")
        return self

    def outside(self) -> dict[str, str]:
        """Fingerprints of the text."""
        quantization: QuantizationFormat = self.format
        trained = self.train.outside() if self.train is not None else {}
        return (
            self.data.outside()
            | quantization.outside()
            | {f"train.{name}": value for name, value in trained.items()}
        )

    def check(self, shape: ModelShape) -> list[str]:
        """Problems of format and training with a model of ``shape``, as text; empty if it fits."""
        quantization: QuantizationFormat = self.format
        problems = quantization.check(shape)
        if self.train is not None and shape.experts:
            problems.append("experts are not trained in quantizers: leave train out")
        return problems

    def rehearsal(self) -> Self:
        """Calibrate on two blocks and compare one."""
        tokens = min(self.calibration_tokens, 2 * self.data.block_tokens)
        trained = self.train and self.train.rehearsal()
        return self.model_copy(
            update={"calibration_tokens": tokens, "heldout_blocks": 1, "train": trained}
        )


def quantize(config: QuantizeConfig, *, source: Artifact, out: Path) -> Artifact:
    """Quantize the checkpoint ``source``; the result at ``out`` still computes in its own dtype.

    With ``train`` the calibrated model stays in the work folder, and training goes on where a run
    that was cut off stood.

    Raises:
        ModelError: if the format does not fit the model, or a scale is missing, zero or infinite.
        TrtKdError: if the loss of a training stops being finite, or an alarm stops it.
    """
    if problems := config.check(read_shape(source.path)):
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ModelError(f"{source.path} does not fit {config.format.kind}:{lines}")
    with writing(out, kind="quantized", config=config, inputs={"source": source}) as draft:
        start = perf_counter()
        if config.train is None:
            draft.metrics |= _calibrate(config, source, draft.path)
        else:
            draft.metrics |= _train(config, config.train, source, draft.path, work_directory(out))
        draft.metrics["seconds"] = perf_counter() - start
    return Artifact.open(out, expect="quantized")


def _calibrate(config: QuantizeConfig, source: Artifact, out: Path) -> dict[str, Metric]:
    """Write the calibrated model into the folder ``out``; return what is worth recording."""
    from trt_kd.exporters.comparison import compare, logits_of
    from trt_kd.quantization.calibration import calibrate
    from trt_kd.quantization.searching import effective_bits
    from trt_kd.quantization.storage import save_quantized

    calibration_NL, heldout_NL = _blocks(config, source)
    model = load_model(source.path)
    reference = list(logits_of(model, heldout_NL))
    kept = calibrate(model, config.format, calibration_NL)
    difference = compare(reference, logits_of(model, heldout_NL))
    save_quantized(model, source, out, kept)
    found: dict[str, Metric] = {
        **_told(difference),
        "calibration_tokens": int(calibration_NL.size),
        "calibration_fingerprint": fingerprint(calibration_NL),
    }
    if isinstance(config.format, Mixed):
        found |= {
            "effective_bits": effective_bits(model, config.format, kept["chosen"]),
            "layer_formats": kept["chosen"],
        }
    return found


def _train(
    config: QuantizeConfig, train: DistillConfig, source: Artifact, out: Path, work: Path
) -> dict[str, Metric]:
    """Write the trained model into the folder ``out``; return what is worth recording."""
    from trt_kd.exporters.comparison import compare, logits_of
    from trt_kd.quantization.storage import load_quantized, save_trained

    begin(work, work_key(config, {"source": source.key}), source)
    calibrated, plain = work / "calibrated", config.model_copy(update={"train": None})
    if not calibrated.is_dir():
        quantize(plain, source=source, out=calibrated)
    before = Artifact.open(calibrated, expect="quantized")
    model = load_quantized(calibrated, dtype="float32")
    log = train_quantized(train, model, source=source, work=work)
    save_trained(model, before, out)
    write_log(log, out)
    _, heldout_NL = _blocks(config, source)
    reference = logits_of(load_model(source.path), heldout_NL)
    return {
        **before.metrics,
        **_told(compare(list(reference), logits_of(model, heldout_NL))),
        "kl_to_source_before_training_nats": before.metrics["kl_to_source_nats"],
        "training": training_metrics(log, train.tokens),
    }


def _told(difference: "Difference") -> dict[str, Metric]:
    return {
        "kl_to_source_nats": difference.kl_nats,
        "top1_agreement": difference.top1_agreement,
        "heldout_tokens": difference.tokens,
    }


def _blocks(config: QuantizeConfig, source: Artifact) -> "tuple[np.ndarray, np.ndarray]":
    """Token ids ``[N, L]`` to calibrate on, and those to compare on."""
    tokenizer = load_tokenizer(source.path)
    count = ceil(config.calibration_tokens / config.data.block_tokens)
    calibration = token_blocks(config.data, tokenizer, split="train", count=count, seed=config.seed)
    heldout = token_blocks(
        config.data, tokenizer, split="heldout", count=config.heldout_blocks, seed=config.seed
    )
    return calibration, heldout
