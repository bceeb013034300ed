"""The README's numbers are those of the committed record."""

import pytest


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("readme_table")


def test_the_table_in_the_readme_is_that_of_the_committed_record(script):
    readme = script.README.read_text(encoding="utf-8")
    assert script.section(script.RECORD) in readme


def test_only_what_stands_between_the_markers_is_replaced(script):
    text = f"a {script.BEGIN} old {script.END} b"
    assert script.replaced(text, "new") == "a new b"
