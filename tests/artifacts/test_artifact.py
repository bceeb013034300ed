"""Artifacts appear whole or not at all, whatever fails, and tell when they were touched."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trt_kd.artifacts import MANIFEST, Artifact, work_directory, writing
from trt_kd.config import StageConfig
from trt_kd.errors import ArtifactError, ModelError

ROOT = Path(__file__).parents[2]


class Config(StageConfig):
    """Stands for a stage's settings."""

    stage = "import"
    note: str = ""


def write(out: Path, *, note: str = "", fails: BaseException | None = None, **inputs: Artifact):
    """Write a small artifact with a file in a subfolder; ``fails`` is raised half-way."""
    with writing(out, kind="checkpoint", config=Config(note=note), inputs=inputs) as draft:
        (draft.path / "weights.bin").write_bytes(bytes(range(256)))
        if fails is not None:
            raise fails
        (draft.path / "sub").mkdir()
        (draft.path / "sub" / "note.txt").write_text(note)
        draft.metrics["parameters"] = 134_515_008
    return Artifact.open(out)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what is written ----------------------------------------------------------------------------


def test_holds_its_files_its_digests_and_its_results(tmp_path):
    artifact = write(tmp_path / "out", note="a")
    assert set(artifact.manifest.files) == {"weights.bin", "sub/note.txt"}
    assert artifact.metrics["parameters"] == 134_515_008
    assert artifact.size_bytes == 257
    assert artifact.manifest.config == {"note": "a"}
    artifact.verify()
    assert leftovers(tmp_path) == ["out"]


def test_missing_parent_folders_are_made(tmp_path):
    write(tmp_path / "runs/quickstart/teacher").verify()


def test_the_manifest_is_written_last_and_only_then_the_name_appears(tmp_path, monkeypatch):
    events = []
    fsync, rename, write_text = os.fsync, Path.rename, Path.write_text

    def spy(name, act):
        def record(*arguments, **options):
            present = (tmp_path / "out").exists()
            events.append((name, Path(str(arguments[0])).name, present))
            return act(*arguments, **options)

        return record

    monkeypatch.setattr(os, "fsync", spy("sync", fsync))
    monkeypatch.setattr(Path, "rename", spy("rename", rename))
    monkeypatch.setattr(Path, "write_text", spy("write", write_text))
    write(tmp_path / "out")
    names = [name for name, _, _ in events]
    assert events[-2][:2] == ("rename", "out.partial")
    manifest = next(i for i, event in enumerate(events) if event[1] == MANIFEST)
    assert names[1:manifest] == ["sync"] * 3  # both files and the folder between, before it
    assert names[manifest + 1 :] == ["sync", "sync", "rename", "sync"]
    assert [present for _, _, present in events[:-1]] == [False] * (len(events) - 1)


def test_it_can_be_moved_and_verified_elsewhere(tmp_path):
    write(tmp_path / "here/out")
    (tmp_path / "there").mkdir()
    shutil.move(tmp_path / "here/out", tmp_path / "there/renamed")
    moved = Artifact.open(tmp_path / "there/renamed", expect="checkpoint")
    moved.verify()
    assert str(tmp_path) not in (moved.path / MANIFEST).read_text()


def test_lineage_tells_every_ancestor_once(tmp_path):
    teacher = write(tmp_path / "teacher", note="teacher")
    pruned = write(tmp_path / "pruned", note="pruned", source=teacher)
    student = write(tmp_path / "student", note="student", teacher=teacher, student=pruned)
    assert student.manifest.inputs == {"teacher": teacher.key, "student": pruned.key}
    assert set(student.manifest.lineage) == {teacher.key, pruned.key}
    ancestor = student.manifest.lineage[pruned.key]
    assert ancestor.inputs == {"source": teacher.key}
    assert ancestor.config == {"note": "pruned"}
    assert teacher.manifest.lineage == {}


# --- opening ------------------------------------------------------------------------------------


def test_a_folder_without_a_manifest_is_unfinished(tmp_path):
    with pytest.raises(ArtifactError, match="did not finish"):
        Artifact.open(tmp_path)
    with pytest.raises(ArtifactError, match="did not finish"):
        Artifact.open(tmp_path / "absent")


def test_an_artifact_of_another_kind_is_refused(tmp_path):
    write(tmp_path / "out")
    with pytest.raises(ArtifactError, match="holds a checkpoint, not a export"):
        Artifact.open(tmp_path / "out", expect="export")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"schema_version": 1', '"schema_version": 2'),
        lambda text: text.replace('"kind": "checkpoint"', '"kind": "cheese"'),
        lambda text: text.replace('"key"', '"kee"'),
        lambda text: text.replace("{", '{"later": 1,', 1),
    ],
)
def test_a_damaged_manifest_is_an_error_that_says_where(tmp_path, damage):
    write(tmp_path / "out")
    manifest = tmp_path / "out" / MANIFEST
    manifest.write_text(damage(manifest.read_text()))
    with pytest.raises(ArtifactError, match="is damaged at") as it:
        Artifact.open(tmp_path / "out")
    assert "run its stage again" in it.value.hint


# --- verification -------------------------------------------------------------------------------


def test_a_changed_file_is_found_also_when_size_and_time_are_the_same(tmp_path):
    artifact = write(tmp_path / "out")
    path = artifact.path / "weights.bin"
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ArtifactError, match=r"weights\.bin was changed"):
        artifact.verify()


@pytest.mark.parametrize("position", range(0, 256, 17))
def test_every_flipped_bit_is_found(tmp_path, position):
    artifact = write(tmp_path / "out")
    path = artifact.path / "weights.bin"
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << (position % 8)
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="was changed"):
        artifact.verify()


def test_a_missing_file_is_found(tmp_path):
    artifact = write(tmp_path / "out")
    (artifact.path / "sub/note.txt").unlink()
    with pytest.raises(ArtifactError, match=r"sub/note\.txt is missing"):
        artifact.verify()


@pytest.mark.parametrize("name", ["extra.bin", f"sub/{MANIFEST}"])
def test_an_added_file_is_found(tmp_path, name):
    artifact = write(tmp_path / "out")
    (artifact.path / name).write_text("new")
    with pytest.raises(ArtifactError, match="was added later"):
        artifact.verify()


# --- failures -----------------------------------------------------------------------------------


def test_an_artifact_that_exists_is_never_written_over(tmp_path):
    first = write(tmp_path / "out", note="first")
    with pytest.raises(ArtifactError, match="exists already"):
        write(tmp_path / "out", note="second")
    first.verify()
    assert leftovers(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "failure", [TypeError("a bug"), ModelError("unfit"), KeyboardInterrupt(), SystemExit(1)]
)
def test_a_crash_leaves_nothing_and_is_passed_on_as_it_was(tmp_path, failure):
    with pytest.raises(type(failure)) as it:
        write(tmp_path / "out", fails=failure)
    assert it.value is failure
    assert leftovers(tmp_path) == []


def test_what_a_killed_stage_left_for_its_successor_outlives_a_crash_but_not_success(tmp_path):
    work = work_directory(tmp_path / "out")
    work.mkdir()
    (work / "step-10").write_text("state")
    with pytest.raises(TypeError):
        write(tmp_path / "out", fails=TypeError())
    assert (work / "step-10").read_text() == "state"
    write(tmp_path / "out")
    assert not work.exists()


def test_the_rest_of_an_earlier_attempt_does_not_get_in(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/stale.bin").write_text("stale")
    assert "stale.bin" not in write(tmp_path / "out").manifest.files


def test_an_output_folder_that_cannot_be_made_is_an_error_with_a_hint(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtifactError, match="cannot be made") as it:
        write(tmp_path / "file/out")
    assert "may write to" in it.value.hint
    assert leftovers(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_an_error_with_a_hint(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ArtifactError, match="cannot be made"):
            write(tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


FAULTS = [
    (owner, name, count)
    for owner, name, calls in (
        (os, "fsync", 5),
        (Path, "write_text", 2),
        (Path, "write_bytes", 1),
        (Path, "rename", 1),
        (Path, "mkdir", 2),
    )
    for count in range(1, calls + 1)
]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from_then_on"])
@pytest.mark.parametrize("fault", FAULTS, ids=[f"{name}-{count}" for _, name, count in FAULTS])
def test_a_full_disk_at_any_point_leaves_nothing_or_all(
    tmp_path, monkeypatch, fault, lasting, code
):
    owner, name, count = fault
    real, calls = getattr(owner, name), []

    def fails(*arguments, **options):
        calls.append(1)
        if len(calls) == count or (lasting and len(calls) > count):
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(ArtifactError, match=os.strerror(code)) as it:
        write(tmp_path / "out")
    monkeypatch.undo()
    assert it.value.hint
    if leftovers(tmp_path):  # the very last sync failed: what stands is whole
        assert (name, count) == ("fsync", 5)
        Artifact.open(tmp_path / "out").verify()
    else:
        write(tmp_path / "out").verify()


# --- kill -9 ------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from trt_kd.artifacts import writing
from trt_kd.config import StageConfig

class Config(StageConfig):
    stage = "import"
    note: str = ""

out, point, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
calls = []

def deadly(act):
    def wrapped(*arguments, **options):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return act(*arguments, **options)
    return wrapped

if point == "fsync":
    os.fsync = deadly(os.fsync)
elif point != "block":
    setattr(Path, point, deadly(getattr(Path, point)))
with writing(out, kind="checkpoint", config=Config(), inputs={}) as draft:
    (draft.path / "weights.bin").write_bytes(bytes(1000))
    if point == "block":
        os.kill(os.getpid(), signal.SIGKILL)
    (draft.path / "config.json").write_bytes(b"{}")
"""


@pytest.mark.parametrize(
    ("point", "count"),
    [("block", 1), ("write_text", 1), ("rename", 1), *(("fsync", n) for n in range(1, 6))],
)
def test_kill_9_leaves_no_artifact_or_a_whole_one_and_a_later_run_succeeds(tmp_path, point, count):
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(out), point, str(count)]
    done = subprocess.run(command, cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    if (point, count) == ("fsync", 5):  # after the rename
        Artifact.open(out, expect="checkpoint").verify()
        return
    assert not out.exists()
    with pytest.raises(ArtifactError, match="did not finish"):
        Artifact.open(out)
    write(out).verify()
    assert leftovers(tmp_path) == ["out"]
