"""The page of families says what running a tiny model of each of them says."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The attention mask")
def test_the_page_is_what_the_models_say():
    spec = spec_from_file_location("families_table", ROOT / "benchmarks" / "families_table.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.page()
    assert "FAILS" not in page
    assert page == module.PAGE.read_text(encoding="utf-8")
