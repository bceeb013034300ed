import re
from html.parser import HTMLParser

import pytest

from trt_kd.reporting.page import page

HOSTILE = "<script>alert('1')</script>&\"'><img src=x onerror=y> $x^2$ {{ 7*7 }}"


class Collector(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs


@pytest.fixture
def hostile(make_report, variant):
    return make_report(
        title=HOSTILE,
        name=HOSTILE,
        variants=[variant("teacher", name=HOSTILE, format=HOSTILE), variant("student")],
        environment={HOSTILE: HOSTILE},
        recipe={HOSTILE: [HOSTILE]},
        notes=[HOSTILE],
        lineage=[
            {"name": HOSTILE, "stage": HOSTILE, "kind": "x", "key": "ab", "inputs": {"a": "b"}}
        ],
    )


def test_text_from_outside_never_becomes_markup(hostile):
    text = page(hostile)
    found = Collector(text)
    assert "script" not in found.tags
    assert "img" not in found.tags
    assert not any(name.startswith("on") for name, _ in found.attributes)
    assert "{{ 7*7 }}" in text


def test_the_page_refers_to_nothing_outside_itself(make_report):
    text = page(make_report())
    assert not re.search(r"https?:|//[a-z]|@import|<script|<iframe|<object", text)
    for name, value in Collector(text).attributes:
        if name in ("src", "href", "xlink:href", "action"):
            assert value.startswith(("#", "data:"))


def test_the_verdict_stands_before_every_table_and_figure(make_report):
    text = page(make_report(verdict="fail"))
    assert text.index('class="verdict fail"') < text.index("<table")
    assert text.index("<table") < text.index("<svg")


def test_a_report_of_one_bare_variant_is_a_page_too(make_report, variant):
    bare = variant("teacher", quality={}, evaluated=None, speed=[])
    assert "<h2>Result</h2>" in page(make_report(variants=[bare], environment={}))
