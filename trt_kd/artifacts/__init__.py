"""Artifacts: finished, digested, portable directories, and the manifest that makes them so."""

from trt_kd.artifacts.artifact import Artifact, Draft, work_directory, writing
from trt_kd.artifacts.manifest import MANIFEST, Kind, Manifest, work_key

__all__ = [
    "MANIFEST",
    "Artifact",
    "Draft",
    "Kind",
    "Manifest",
    "work_directory",
    "work_key",
    "writing",
]
