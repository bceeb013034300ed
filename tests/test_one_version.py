"""What `make test-transformers4` leaves out: tests that no version of transformers can change.

While one of them runs, neither transformers nor what is made of it can be imported, see conftest.
"""

import pytest


def test_what_runs_under_one_version_is_there(root, one_version):
    assert [path for path in one_version if not path.exists()] == []
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    assert "tests/without_transformers.txt" in makefile


def test_what_runs_under_one_version_imports_nothing_of_transformers(
    root, one_version, on_transformers, imports
):
    assert "trt_kd.training.loop" in on_transformers
    assert "trt_kd.pruning.catalogue" not in on_transformers
    files = [
        file for path in one_version for file in (path.glob("*.py") if path.is_dir() else [path])
    ]
    files += {path.parent / "conftest.py" for path in one_version} - {root / "tests/conftest.py"}
    found = {
        f"{file.parent.name}/{file.name}: {name}"
        for file in files
        if file.exists()
        for name in imports(file, everywhere=True) & on_transformers
    }
    assert found == set()


def test_transformers_is_out_of_reach_here():
    for name in ("transformers", "modelopt", "trt_kd.training.loop"):
        with pytest.raises(ImportError):
            __import__(name)
