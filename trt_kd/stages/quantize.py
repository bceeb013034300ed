"""Quantize: calibrate a low-bit format with Model Optimizer and keep the fake-quantized model."""

from math import ceil
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, ClassVar

from pydantic import PositiveInt
from typing_extensions import Self

from trt_kd.architectures.shape import read_shape
from trt_kd.artifacts import Artifact, writing
from trt_kd.checkpoints import load_model, load_tokenizer
from trt_kd.config import StageConfig, plugin_field
from trt_kd.data.base import DataConfig, fingerprint, token_blocks
from trt_kd.errors import ModelError
from trt_kd.quantization import FORMATS
from trt_kd.quantization.base import QuantizationFormat
from trt_kd.quantization.mixed import Mixed

if TYPE_CHECKING:
    import numpy as np


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
    seed: int = 0
    """Order of the documents."""

    def outside(self) -> dict[str, str]:
        """Fingerprints of the text."""
        quantization: QuantizationFormat = self.format
        return self.data.outside() | quantization.outside()

    def rehearsal(self) -> Self:
        """Calibrate on two blocks and compare one."""
        tokens = min(self.calibration_tokens, 2 * self.data.block_tokens)
        return self.model_copy(update={"calibration_tokens": tokens, "heldout_blocks": 1})


def quantize(config: QuantizeConfig, *, source: Artifact, out: Path) -> Artifact:
    """Quantize the checkpoint ``source``; the result at ``out`` still computes in its own dtype.

    Raises:
        ModelError: if the format does not fit the model, or a scale is missing, zero or infinite.
    """
    from trt_kd.exporters.comparison import compare, logits_of
    from trt_kd.quantization.calibration import calibrate
    from trt_kd.quantization.searching import effective_bits
    from trt_kd.quantization.storage import save_quantized

    quantization: QuantizationFormat = config.format
    if problems := quantization.check(read_shape(source.path)):
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ModelError(f"{source.path} does not fit {quantization.kind}:{lines}")
    with writing(out, kind="quantized", config=config, inputs={"source": source}) as draft:
        start = perf_counter()
        calibration_NL, heldout_NL = _blocks(config, source)
        model = load_model(source.path)
        reference = list(logits_of(model, heldout_NL))
        kept = calibrate(model, quantization, calibration_NL)
        difference = compare(reference, logits_of(model, heldout_NL))
        save_quantized(model, source, draft.path, kept)
        draft.metrics |= {
            "kl_to_source_nats": difference.kl_nats,
            "top1_agreement": difference.top1_agreement,
            "heldout_tokens": difference.tokens,
            "calibration_tokens": int(calibration_NL.size),
            "calibration_fingerprint": fingerprint(calibration_NL),
            "seconds": perf_counter() - start,
        }
        if isinstance(quantization, Mixed):
            draft.metrics |= {
                "effective_bits": effective_bits(model, quantization, kept["chosen"]),
                "layer_formats": kept["chosen"],
            }
    return Artifact.open(out, expect="quantized")


def _blocks(config: QuantizeConfig, source: Artifact) -> "tuple[np.ndarray, np.ndarray]":
    """Token ids ``[N, L]`` to calibrate on, and those to compare on."""
    tokenizer = load_tokenizer(source.path)
    count = ceil(config.calibration_tokens / config.data.block_tokens)
    calibration = token_blocks(config.data, tokenizer, split="train", count=count, seed=config.seed)
    heldout = token_blocks(
        config.data, tokenizer, split="heldout", count=config.heldout_blocks, seed=config.seed
    )
    return calibration, heldout
