"""The README's numbers are those of the committed record."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = spec_from_file_location("readme_table", ROOT / "benchmarks" / "readme_table.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_in_the_readme_is_that_of_the_committed_record(script):
    readme = script.README.read_text(encoding="utf-8")
    assert script.section(script.RECORD) in readme


def test_only_what_stands_between_the_markers_is_replaced(script):
    text = f"a {script.BEGIN} old {script.END} b"
    assert script.replaced(text, "new") == "a new b"
