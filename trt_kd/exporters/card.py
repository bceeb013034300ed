"""``model_card.md`` of an export: what it is, where it comes from, how far it was proven.

In the form of Mitchell et al. 2019 (arXiv:1810.03993), for a reader who has the folder alone.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from trt_kd.artifacts import Artifact
from trt_kd.artifacts.manifest import Metric
from trt_kd.exporters.base import Exporter

CARD = "model_card.md"
_MEANT = (
    "Compared on held-out text with the model that it was made from; quality on tasks is another "
    "question."
)
_PROOF = {
    "weight_bytes": "bytes of weights",
    "realised_low_bit_share": "share of the matrix weights in 8 bits or fewer",
    "logits_kl_nats": "KL to what it was made from (nats per token)",
    "logits_kl_limit_nats": "its limit",
    "logits_max_abs": "largest difference of a logit",
    "top1_agreement": "share of positions with the same first choice",
    "verified_tokens": "tokens compared",
}
_SOURCE = {
    "kl_to_source_nats": "KL of the quantization itself (nats per token)",
    "calibration_tokens": "calibration tokens",
    "calibration_fingerprint": "fingerprint of the calibration text",
}


def inherited_licence(source: Artifact) -> str:
    """Licence of the imported model that ``source`` descends from; empty where none is known."""
    told = [source.metrics.get("license")]
    told += [ancestor.license for ancestor in source.manifest.lineage.values()]
    return next((str(licence) for licence in told if licence), "")


def export_card(lane: Exporter, source: Artifact, metrics: Mapping[str, Metric]) -> str:
    """The card of an export of ``source`` through ``lane`` with these ``metrics``; Markdown."""
    licence = inherited_licence(source)
    terms = (
        f"The imported model names the licence {licence}; it covers this one too."
        if licence
        else "The imported model names no licence: look it up before sharing this one."
    )
    return "\n".join(
        [
            f"# Export for {lane.kind}\n",
            f"Settings of the lane: `{_plain(lane.model_dump(mode='json'))}`\n",
            "## How it was made\n",
            *_steps(source),
            "\n## What was checked\n",
            "| What | Value |",
            "| :-- | --: |",
            *_rows(_SOURCE, source.metrics),
            *_rows(_PROOF, metrics),
            f"\n{_MEANT}\n",
            f"## Licence\n\n{terms}\n",
        ]
    )


def _steps(source: Artifact) -> Iterator[str]:
    """Every stage from the import on, with its settings."""
    manifest = source.manifest
    made = [(key, one.stage, one.config) for key, one in manifest.lineage.items()]
    made.append((source.key, manifest.stage, manifest.config))
    for number, (key, stage, config) in enumerate(made, 1):
        yield f"{number}. {stage} `{key[:12]}`: `{_plain(config)}`"


def _rows(names: Mapping[str, str], metrics: Mapping[str, Metric]) -> Iterator[str]:
    for key, what in names.items():
        value = metrics.get(key)
        if isinstance(value, float):
            yield f"| {what} | {value:.3g} |"
        elif isinstance(value, int):
            yield f"| {what} | {value:,} |"
        elif value is not None:
            yield f"| {what} | {value} |"


def _plain(config: Mapping[str, Any]) -> str:
    """Settings in one line of JSON that cannot end a code span."""
    return json.dumps(config, ensure_ascii=False).replace("`", "'")
