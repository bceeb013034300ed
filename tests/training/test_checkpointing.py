import json

import pytest

from trt_kd.errors import ArtifactError
from trt_kd.training import checkpointing
from trt_kd.training.checkpointing import (
    MARKER,
    check_space,
    claim,
    is_complete,
    mark_complete,
    newest_complete,
    remove_older,
)


@pytest.fixture
def save(tmp_path):
    """Write a checkpoint of a step, marked or not."""

    def write(step, *, marked=True):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "model.safetensors").write_bytes(bytes(range(100)))
        (checkpoint / "optimizer.pt").write_bytes(b"moments" * step)
        if marked:
            mark_complete(checkpoint)
        return checkpoint

    return write


def test_a_marked_checkpoint_is_complete(save):
    assert is_complete(save(2))


def test_the_newest_complete_checkpoint_is_found_by_step_not_by_name(save, tmp_path):
    save(9)
    newest = save(10)
    assert newest_complete(tmp_path) == newest


def without_marker(checkpoint):
    (checkpoint / MARKER).unlink()


def with_half_a_marker(checkpoint):
    marker = checkpoint / MARKER
    marker.write_bytes(marker.read_bytes()[:20])


def with_another_marker(checkpoint):
    (checkpoint / MARKER).write_text(json.dumps({"files": ["optimizer.pt"]}), encoding="utf-8")


def with_a_file_cut_short(checkpoint):
    (checkpoint / "optimizer.pt").write_bytes(b"moment")


def with_a_file_changed(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[::-1])


def with_a_file_missing(checkpoint):
    (checkpoint / "optimizer.pt").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        without_marker,
        with_half_a_marker,
        with_another_marker,
        with_a_file_cut_short,
        with_a_file_changed,
        with_a_file_missing,
    ],
)
def test_a_newer_checkpoint_that_is_damaged_is_passed_over_and_removed(save, tmp_path, damage):
    older, newer = save(2), save(4)
    damage(newer)
    assert newest_complete(tmp_path) == older
    assert not newer.exists()
    assert older.exists()


def test_without_a_complete_checkpoint_there_is_nothing_to_go_on_from(save, tmp_path):
    save(2, marked=False)
    assert newest_complete(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_older_checkpoints_go_and_the_newest_stays(save, tmp_path):
    save(2)
    newest = save(4)
    remove_older(tmp_path, newest)
    assert list(tmp_path.iterdir()) == [newest]


def test_a_work_folder_serves_the_work_it_was_made_for(tmp_path):
    work = tmp_path / "out.work"
    kept = claim(work, "key") / "checkpoint-2"
    kept.mkdir()
    assert claim(work, "key") == kept.parent
    assert kept.is_dir()


@pytest.mark.parametrize("owner", ["another key", None])
def test_what_other_work_left_in_a_work_folder_is_removed(tmp_path, owner):
    work = tmp_path / "out.work"
    left = claim(work, "key") / "checkpoint-2"
    left.mkdir()
    if owner is None:
        (work / "work_key").unlink()
    claim(work, owner or "key")
    assert not left.exists()


def test_a_disk_too_small_is_found_before_training(tmp_path, monkeypatch):
    class Usage:
        free = 1_000_000

    monkeypatch.setattr(checkpointing.shutil, "disk_usage", lambda _folder: Usage)
    check_space(tmp_path, parameters=40_000)
    with pytest.raises(ArtifactError, match=r"needs 2\.4 GB .* 0\.0 GB are free"):
        check_space(tmp_path, parameters=100_000_000)
