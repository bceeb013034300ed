import random
import re
from xml.etree import ElementTree

import pytest

from trt_kd.reporting.drawing import file_name, standalone
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
    assert len(drawn) == 6
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


def test_a_single_point_makes_no_figure_of_speed(make_report, variant, speed):
    drawn = figures(make_report(variants=[variant("teacher", speed=[speed(20.0, 1)])]))
    assert [drawing.title for drawing in drawn] == []


def test_the_roofline_shows_a_mark_for_every_regime(make_report, variant, speed):
    records = [
        speed(20.0, size, decode_floor_ms=12.0, decode_bound=bound)
        for size, bound in ((1, "weights"), (8, "cache"), (64, "compute"))
    ]
    drawn = {d.title: d for d in figures(make_report(variants=[variant("teacher", speed=records)]))}
    kinds = set(re.findall(r'<path id="([^"]+)"', drawn["Share of the roofline"].svg))
    assert len([name for name in kinds if "m" in name]) >= 3


def test_of_a_sweep_over_lengths_one_pair_is_drawn_over_batch_sizes(make_report, variant, speed):
    sweep = [speed(20.0, size) for size in (1, 2, 4)]
    sweep += [speed(30.0, size, input_tokens=256) for size in (1, 2)]
    drawn = {d.title: d for d in figures(make_report(variants=[variant("teacher", speed=sweep)]))}
    assert "128 + 32 tokens" in drawn["Latency by batch size"].text
    assert "Batch 1, 32 output tokens" in drawn["Time to the first token by prompt length"].text


def test_a_figure_on_its_own_is_a_file_that_any_viewer_opens(make_report):
    drawn = figures(make_report())
    assert len({file_name(drawing) for drawing in drawn}) == len(drawn)
    for drawing in drawn:
        root = ElementTree.fromstring(standalone(drawing))
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in standalone(drawing)
