"""Directories that appear whole or not at all.

A stage writes into ``<out>.partial``; the manifest is written last and the directory is renamed
into place, each step synced to disk. What a stage needs to go on after a kill lives beside it in
``<out>.work`` and is removed once the artifact stands.
"""

import errno
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from pydantic import ValidationError

from trt_kd.artifacts.environment import environment
from trt_kd.artifacts.manifest import (
    MANIFEST,
    Ancestor,
    Kind,
    Manifest,
    Metric,
    sha256_of,
    work_key,
)
from trt_kd.config import StageConfig
from trt_kd.errors import ArtifactError

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


@dataclass(frozen=True)
class Artifact:
    """A finished directory and its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path, *, expect: Kind | None = None) -> "Artifact":
        """Open the artifact at ``path``; files are not digested, see ``verify``.

        Raises:
            ArtifactError: if there is none, its manifest is damaged or it is of another kind.
        """
        manifest_path = path / MANIFEST
        if path.exists() and not path.is_dir():
            raise ArtifactError(f"{path} is not a folder", hint="give the folder of an artifact")
        if not manifest_path.is_file():
            what = f"holds no {MANIFEST}" if path.exists() else "does not exist"
            raise ArtifactError(
                f"{path} {what}",
                hint="the stage that writes it did not finish (run `trt-kd run` again to resume), "
                "or another folder is meant",
            )
        try:
            manifest = Manifest.model_validate_json(manifest_path.read_bytes())
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ArtifactError(
                f"{manifest_path} is damaged at {where or 'the top'}: {first['msg']}",
                hint=f"remove {path} and run its stage again",
            ) from error
        if expect is not None and manifest.kind != expect:
            raise ArtifactError(
                f"{path} holds a {manifest.kind}, not a {expect}",
                hint="give this stage the output of the stage before it",
            )
        return cls(path, manifest)

    @property
    def key(self) -> str:
        """Identity of the work that made this artifact."""
        return self.manifest.key

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """Results recorded by the stage."""
        return self.manifest.metrics

    @property
    def size_bytes(self) -> int:
        """Sum of the sizes of all its files, the manifest left out."""
        return sum((self.path / name).stat().st_size for name in self.manifest.files)

    def verify(self) -> None:
        """Digest every file and compare with the manifest.

        Raises:
            ArtifactError: naming the first missing, added or changed file.
        """
        present = _files(self.path)
        recorded = self.manifest.files
        for name in sorted(set(recorded) - set(present)):
            raise ArtifactError(f"{self.path}: {name} is missing", hint=self._remedy)
        for name in sorted(set(present) - set(recorded)):
            raise ArtifactError(f"{self.path}: {name} was added later", hint=self._remedy)
        for name, digest in recorded.items():
            if sha256_of(self.path / name) != digest:
                raise ArtifactError(f"{self.path}: {name} was changed", hint=self._remedy)

    @property
    def _remedy(self) -> str:
        return f"artifacts are immutable: remove {self.path} and run its stage again"


@dataclass
class Draft:
    """An artifact in the making: put files under ``path`` and results into ``metrics``."""

    path: Path
    metrics: dict[str, Metric] = field(default_factory=dict)


def work_directory(out: Path) -> Path:
    """Directory beside ``out`` for state that survives a kill (training checkpoints, shards)."""
    return out.with_name(out.name + ".work")


@contextmanager
def writing(
    out: Path, *, kind: Kind, config: StageConfig, inputs: Mapping[str, Artifact]
) -> Iterator[Draft]:
    """Yield a draft that becomes the artifact ``out`` only if the block succeeds.

    Raises:
        ArtifactError: if ``out`` exists already or its folder cannot be written.
    """
    if out.exists():
        raise ArtifactError(
            f"{out} exists already", hint="artifacts are immutable: choose another folder"
        )
    scratch = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    except OSError as error:
        raise ArtifactError(
            f"{scratch} cannot be made: {error.strerror}",
            hint="choose an output folder that you may write to",
        ) from error
    draft = Draft(scratch)
    try:
        yield draft
        _finish(draft, out, kind=kind, config=config, inputs=inputs)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise ArtifactError(
                f"{out} could not be written: {error.strerror}",
                hint="free disk space or choose another folder, then run again",
            ) from error
        raise
    shutil.rmtree(work_directory(out), ignore_errors=True)


def _finish(
    draft: Draft,
    out: Path,
    *,
    kind: Kind,
    config: StageConfig,
    inputs: Mapping[str, Artifact],
) -> None:
    """Digest, sync, write the manifest last and rename into place."""
    _require_finite(draft.metrics, draft.path)
    files = _files(draft.path)
    input_keys = {role: artifact.key for role, artifact in inputs.items()}
    manifest = Manifest(
        kind=kind,
        stage=config.stage,
        key=work_key(config, input_keys),
        config=config.model_dump(mode="json"),
        inputs=input_keys,
        lineage=_lineage(inputs.values()),
        metrics=draft.metrics,
        files={name: sha256_of(draft.path / name) for name in files},
        environment=environment(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    sync_tree(draft.path)
    target = draft.path / MANIFEST
    target.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    sync(target)
    sync(draft.path)
    draft.path.rename(out)
    sync(out.parent)


def _require_finite(value: object, out: Path, name: str = "") -> None:
    """Refuse a result that JSON cannot hold: a number nobody could have measured."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ArtifactError(
            f"{out.stem}: the metric {name} is {value}",
            hint="look for NaN or infinity in the model or its input",
        )
    if isinstance(value, Mapping):
        for key, item in value.items():
            _require_finite(item, out, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            _require_finite(item, out, name)


def _lineage(inputs: Iterable[Artifact]) -> dict[str, Ancestor]:
    lineage: dict[str, Ancestor] = {}
    for artifact in inputs:
        manifest = artifact.manifest
        lineage |= manifest.lineage
        licence = manifest.metrics.get("license")
        lineage[manifest.key] = Ancestor(
            kind=manifest.kind,
            stage=manifest.stage,
            config=manifest.config,
            inputs=manifest.inputs,
            license=str(licence) if licence else None,
        )
    return lineage


def _files(root: Path) -> list[str]:
    found = (path for path in root.rglob("*") if path.is_file())
    names = (path.relative_to(root).as_posix() for path in found)
    return sorted(name for name in names if name != MANIFEST)


def sync_tree(root: Path) -> None:
    """Bring every file and folder below ``root`` to disk."""
    for path in sorted(root.rglob("*")):
        sync(path)


def sync(path: Path) -> None:
    """Bring one file, or the names in one folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
