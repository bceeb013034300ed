import random
import re
from itertools import combinations

import pytest

from trt_kd.reporting.drawing import FONT_POINTS
from trt_kd.reporting.figures import figures
from trt_kd.reporting.labels import GAP_POINTS, Point, grown, overlap, place_labels

FRAME = (50.0, 30.0, 430.0, 300.0)
NAMES = ["teacher", "teacher, int4", "pruned, untrained", "trained on cross-entropy", "student",
         "student, int4"]  # fmt: skip


def cluster(seed: int, *, spread: float) -> list[Point]:
    source = random.Random(seed)
    x, y = source.uniform(60, 420), source.uniform(40, 290)
    return [
        Point(x + source.uniform(-spread, spread), y + source.uniform(-spread, spread), name)
        for name in NAMES
    ]


@pytest.mark.parametrize("spread", [0, 5, 40])
@pytest.mark.parametrize("seed", range(10))
def test_names_of_near_marks_keep_their_distance_inside_the_frame(seed, spread):
    points = cluster(seed, spread=spread)
    marks = [(p.x - 6, p.y - 6, p.x + 6, p.y + 6) for p in points]
    boxes = place_labels(points, marks, FRAME, pixels_per_point=1.0)
    for first, second in combinations(boxes, 2):
        assert overlap(grown(first, 0.99 * GAP_POINTS), second) == 0
    for box in boxes:
        assert overlap(box, FRAME) == pytest.approx((box[2] - box[0]) * (box[3] - box[1]))


def test_places_are_the_same_twice_and_scale_with_the_drawing():
    points = cluster(3, spread=8)
    boxes = place_labels(points, [], FRAME, pixels_per_point=1.0)
    assert boxes == place_labels(points, [], FRAME, pixels_per_point=1.0)
    double = [Point(2 * p.x, 2 * p.y, p.name) for p in points]
    frame = tuple(2 * side for side in FRAME)
    larger = place_labels(double, [], frame, pixels_per_point=2.0)
    for box, other in zip(boxes, larger, strict=True):
        assert other == pytest.approx([2 * side for side in box])


def test_a_lonely_mark_has_its_name_at_its_right():
    (box,) = place_labels([Point(200, 150, "student")], [], FRAME, pixels_per_point=1.0)
    assert box[0] == pytest.approx(209)
    assert (box[1] + box[3]) / 2 == pytest.approx(150)


def anchors(svg: str) -> dict[str, tuple[float, float]]:
    """Where the words of a drawing are anchored, in points."""
    placed = re.findall(r'<text[^>]*\bx="([\d.-]+)" y="([\d.-]+)"[^>]*>([^<]*)<', svg)
    return {name: (float(x), float(y)) for x, y, name in placed}


def test_the_two_quantized_variants_stay_apart_in_the_first_figure(make_report, variant):
    rows = [variant("teacher"), variant("teacher_quantized"), variant("student_quantized")]
    near = [record.model_copy(update={"itl_ms": rows[1].speed[i].itl_ms})
            for i, record in enumerate(rows[2].speed)]  # fmt: skip
    rows[2] = rows[2].model_copy(update={"speed": near, "quality": rows[1].quality})
    words = anchors(figures(make_report(variants=rows))[0].svg)
    (x, y), (u, v) = words["teacher quantized"], words["student quantized"]
    assert abs(y - v) >= 1.3 * FONT_POINTS or abs(x - u) >= 9 * FONT_POINTS
