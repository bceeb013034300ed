"""The page of families says what running a tiny model of each of them says."""

import pytest


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The attention mask")
def test_the_page_is_what_the_models_say(families):
    page = families.page()
    assert "FAILS" not in page
    assert page == families.PAGE.read_text(encoding="utf-8")
