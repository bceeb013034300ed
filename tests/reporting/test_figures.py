import random
import re
from xml.etree import ElementTree

import pytest

from trt_kd.reporting.figures import figures, pareto


def beats(a, b):
    return a[0] <= b[0] and a[1] >= b[1] and a != b


@pytest.mark.parametrize("seed", range(30))
def test_the_pareto_front_is_what_brute_force_finds(seed):
    source = random.Random(seed)
    points = [(source.randint(0, 6), source.randint(0, 6)) for _ in range(source.randint(1, 12))]
    expected = {i for i, p in enumerate(points) if not any(beats(q, p) for q in points)}
    found = pareto(points)
    assert set(found) == expected
    assert len(found) == len(expected)
    assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)


def test_every_figure_is_drawn_and_names_every_variant_it_shows(make_report):
    report = make_report()
    drawn = figures(report)
    assert len(drawn) == 4
    for drawing in drawn[:2]:
        assert all(variant.name in drawing.svg for variant in report.variants)


def test_figures_are_well_formed_themed_and_refer_to_nothing_outside(make_report):
    ids = []
    for drawing in figures(make_report()):
        root = ElementTree.fromstring(drawing.svg)
        assert root.get("viewBox")
        assert root.get("width") is None
        assert "http" not in drawing.svg
        assert "currentColor" in drawing.svg
        assert "#010203" not in drawing.svg
        names = re.findall(r'\sid="([^"]+)"', drawing.svg)
        for name in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', drawing.svg):
            assert (name[0] or name[1]) in names
        ids += names
    assert len(ids) == len(set(ids))


def test_figures_are_the_same_twice(make_report):
    assert figures(make_report()) == figures(make_report())


def test_no_numbers_no_figures(make_report, variant):
    bare = [
        variant(role, quality={}, speed=[], same_speed_as=None) for role in ("teacher", "student")
    ]
    assert figures(make_report(variants=bare)) == []
