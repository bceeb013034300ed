"""Read an export back and compare it with its source; an exporter is never taken at its word."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trt_kd.artifacts import Artifact
from trt_kd.errors import ModelError, VerificationError
from trt_kd.exporters.base import Exporter
from trt_kd.exporters.comparison import Difference, compare, logits_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_source(source: Artifact) -> "PreTrainedModel":
    """Load what the export must agree with, computing in float32."""
    if source.manifest.kind == "quantized":
        from trt_kd.quantization.storage import load_quantized

        return load_quantized(source.path, dtype="float32")
    from trt_kd.checkpoints import load_model

    return load_model(source.path, dtype="float32")


def source_logits(source: Artifact, blocks_NL: np.ndarray) -> list[np.ndarray]:
    """Logits ``[1, L, V]`` of each block by the source; the model is freed on return."""
    return list(logits_of(load_source(source), blocks_NL))


def check_files(lane: Exporter, source: Artifact, out: Path) -> None:
    """Check what the files in ``out`` themselves say.

    Raises:
        VerificationError: if they disagree with ``source``.
    """
    if problems := lane.problems(source, out):
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise VerificationError(
            f"{lane.kind} export: {len(problems)} problem(s) in the files written{lines}",
            hint="the exporter and its source disagree; this is no fault of your recipe, report it",
        )


def verify(
    lane: Exporter,
    source: Artifact,
    out: Path,
    blocks_NL: np.ndarray,
    reference: Sequence[np.ndarray],
) -> Difference:
    """Compare the export in ``out`` with ``source``: its files, then its logits.

    ``reference`` are the source's logits on ``blocks_NL``.

    Raises:
        VerificationError: if the files disagree with the source, cannot be read back, or the
            logits are further away than the lane allows.
    """
    check_files(lane, source, out)
    try:
        with lane.reader().load(out) as session:
            written = (session.logits(block[None]) for block in blocks_NL)
            difference = compare(reference, written)
    except (ModelError, ValueError) as error:
        raise VerificationError(f"{lane.kind} export cannot be read back: {error}") from error
    limit = lane.kl_limit_nats(source)
    if not difference.kl_nats <= limit:
        raise VerificationError(
            f"{lane.kind} export strays from its source: mean KL {difference.kl_nats:.3g} nats per "
            f"token, limit {limit:g} (largest logit difference {difference.max_abs:.3g}, "
            f"top-1 agreement {difference.top1_agreement:.1%})",
            hint="choose a format with more bits, or give more calibration tokens",
        )
    return difference
