"""Artifacts: finished, digested, portable directories, and the manifest that makes them so."""

from trt_kd.artifacts.artifact import Artifact, Draft, work_directory, writing
from trt_kd.artifacts.manifest import MANIFEST, Kind, Manifest, work_key
from trt_kd.artifacts.work import RESULT, Finished, claim_work, piece

__all__ = [
    "MANIFEST",
    "RESULT",
    "Artifact",
    "Draft",
    "Finished",
    "Kind",
    "Manifest",
    "claim_work",
    "piece",
    "work_directory",
    "work_key",
    "writing",
]
