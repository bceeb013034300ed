"""Export: write a model for the runtime that serves it, read it back, compare."""

from pathlib import Path
from time import perf_counter
from typing import ClassVar

from pydantic import PositiveInt
from typing_extensions import Self

from trt_kd.architectures.shape import read_shape
from trt_kd.artifacts import Artifact, Draft, claim_work, work_directory, work_key, writing
from trt_kd.checkpoints import load_tokenizer
from trt_kd.config import StageConfig, plugin_field
from trt_kd.data.base import DataConfig, token_blocks
from trt_kd.errors import ArtifactError, ModelError
from trt_kd.exporters import EXPORTERS
from trt_kd.exporters.base import Exporter
from trt_kd.exporters.card import CARD, export_card

PROVEN = (
    "logits_kl_nats",
    "logits_kl_limit_nats",
    "logits_max_abs",
    "top1_agreement",
    "verified_tokens",
)
"""What the comparison with the source found."""
WEIGHTS = (".safetensors", ".onnx", ".data", ".engine")


class ExportConfig(StageConfig):
    """Where to, and on how much text the result is compared with its source."""

    stage: ClassVar[str] = "export"

    lane: plugin_field(EXPORTERS, Exporter)  # type: ignore[valid-type]
    """The exporter and its options."""
    data: DataConfig = DataConfig()
    """Text whose held-out split the logits are compared on."""
    verify_blocks: PositiveInt = 4
    """Held-out blocks to compare."""
    seed: int = 0
    """Order of the documents."""

    def outside(self) -> dict[str, str]:
        """Fingerprints of the text."""
        return self.data.outside()

    def rehearsal(self) -> Self:
        """The lane without its searches, one block compared."""
        return self.model_copy(update={"lane": self.lane.rehearsal(), "verify_blocks": 1})


def export(config: ExportConfig, *, source: Artifact, out: Path) -> Artifact:
    """Write ``source``, a checkpoint or a quantized model, for ``config.lane`` at ``out``.

    Raises:
        ModelError: if the lane cannot take this source.
        VerificationError: if what was written does not say what the source says.
    """
    from trt_kd.exporters.verification import source_logits, verify

    lane: Exporter = config.lane
    _check(lane, source)
    if (basis := lane.basis()) is not None:
        return _export_on(basis, config, source, out)
    with writing(out, kind="export", config=config, inputs={"source": source}) as draft:
        start = perf_counter()
        blocks_NL = token_blocks(
            config.data,
            load_tokenizer(source.path),
            split="heldout",
            count=config.verify_blocks,
            seed=config.seed,
        )
        reference = source_logits(source, blocks_NL)
        draft.metrics |= lane.export(source, draft.path)
        difference = verify(lane, source, draft.path, blocks_NL, reference)
        draft.metrics |= {
            "logits_kl_nats": difference.kl_nats,
            "logits_kl_limit_nats": lane.kl_limit_nats(source),
            "logits_max_abs": difference.max_abs,
            "top1_agreement": difference.top1_agreement,
            "verified_tokens": difference.tokens,
            "weight_bytes": weight_bytes(draft.path),
            "seconds": perf_counter() - start,
        }
        _write_card(lane, source, draft)
    return Artifact.open(out, expect="export")


def _export_on(basis: Exporter, config: ExportConfig, source: Artifact, out: Path) -> Artifact:
    """Export what is made from another lane's export, which stays in the work folder until then."""
    from trt_kd.exporters.verification import check_files

    lane: Exporter = config.lane
    with writing(out, kind="export", config=config, inputs={"source": source}) as draft:
        start = perf_counter()
        work = claim_work(work_directory(out), work_key(config, {"source": source.key}))
        folder = work / basis.kind
        if not folder.is_dir():
            export(config.model_copy(update={"lane": basis}), source=source, out=folder)
        made = Artifact.open(folder, expect="export")
        draft.metrics |= {key: made.metrics[key] for key in PROVEN}
        draft.metrics |= lane.export(made, draft.path)
        check_files(lane, made, draft.path)
        draft.metrics |= {
            "weight_bytes": weight_bytes(draft.path),
            "seconds": perf_counter() - start,
        }
        _write_card(lane, source, draft)
    return Artifact.open(out, expect="export")


def _write_card(lane: Exporter, source: Artifact, draft: Draft) -> None:
    text = export_card(lane, source, draft.metrics)
    (draft.path / CARD).write_text(text, encoding="utf-8")


def weight_bytes(directory: Path) -> int:
    """Bytes of the files in ``directory`` that hold weights; of an engine's, the engine alone."""
    files = [path for path in directory.rglob("*") if path.suffix in WEIGHTS]
    engines = [path for path in files if path.suffix == ".engine"]
    return sum(path.stat().st_size for path in engines or files)


def _check(lane: Exporter, source: Artifact) -> None:
    kind = source.manifest.kind
    if kind not in ("checkpoint", "quantized"):
        raise ArtifactError(
            f"{source.path} holds a {kind}, which is not exported",
            hint="export a checkpoint or a quantized model",
        )
    shape = read_shape(source.path)
    if problems := lane.check(shape, kind) or lane.check_source(source):
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ModelError(f"{source.path} cannot go to {lane.kind}:{lines}")
