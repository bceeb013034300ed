"""The manifest ``trt_kd.json``: what an artifact is, what made it, from what, with which result."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from trt_kd.config import StageConfig

MANIFEST = "trt_kd.json"

Kind = Literal[
    "checkpoint",
    "scores",
    "latency",
    "text",
    "quantized",
    "sensitivity",
    "export",
    "pair",
    "evaluation",
    "benchmark",
    "report",
]
Metric = float | int | str | bool | None | list[Any] | dict[str, Any]


class Manifest(BaseModel):
    """Contents of ``trt_kd.json``; unknown keys of later versions are refused, not ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    schema_version: Literal[1] = 1
    """Version of this layout."""
    kind: Kind
    """What the directory holds."""
    stage: str
    """The stage that wrote it."""
    key: str
    """Identity of the work: equal key, equal work; see ``work_key``."""
    config: dict[str, Any]
    """The stage's resolved settings."""
    inputs: dict[str, str]
    """Key of every input artifact by its role."""
    lineage: dict[str, "Ancestor"] = {}
    """Every artifact this one descends from, by key."""
    metrics: dict[str, Metric] = {}
    """Results, with the unit in every name."""
    files: dict[str, str] = {}
    """sha256 of every file, by path relative to the directory, with ``/``."""
    environment: dict[str, Metric] = {}
    """Hardware and versions of the machine that did the work."""
    created: str = ""
    """UTC time of completion, ISO 8601."""


class Ancestor(BaseModel):
    """An earlier artifact, as much as is needed to tell how a later one came to be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind
    stage: str
    config: dict[str, Any]
    inputs: dict[str, str]
    license: str | None = None


def work_key(config: StageConfig, inputs: Mapping[str, str]) -> str:
    """256-bit identity of one piece of work, in hexadecimal.

    It covers the stage and its version, the resolved settings, the fingerprints of outside data
    and the key of every input by role; never a path's age.
    """
    work = {
        "stage": config.stage,
        "version": config.version,
        "config": config.model_dump(mode="json"),
        "outside": config.outside(),
        "inputs": dict(inputs),
    }
    canonical = json.dumps(work, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Digest of one file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
