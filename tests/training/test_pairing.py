"""Which layers are paired: rules, ranges, similarity."""

import itertools

import numpy as np
import pytest
from pydantic import ValidationError

from trt_kd.errors import ConfigError
from trt_kd.training.pairing import (
    Pairing,
    default_count,
    judged,
    most_similar,
    paired,
    spread,
)


@pytest.mark.parametrize("depth", range(1, 100))
def test_3_to_6_layers_are_paired_by_default_and_no_more_than_there_are(depth):
    count = default_count(depth)
    assert count == min(depth, max(3, min(6, depth // 6)))
    layers = spread(depth, count)
    assert len(set(layers)) == count
    assert layers == sorted(layers)
    assert layers[-1] == depth - 1
    gaps = {b - a for a, b in itertools.pairwise(layers)}
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(("student", "teacher"), [(4, 4), (3, 5), (24, 30), (5, 3)])
def test_proportional_pairs_are_those_of_the_formula(student, teacher):
    pairs = paired(Pairing(count=student), (student, teacher), None)
    assert pairs == [(i, int(np.floor(i * teacher / student))) for i in range(student)]


def test_kept_pairs_are_a_layer_and_what_it_was_before_pruning():
    pairs = paired(Pairing(pairs="kept", count=2), (4, 6), [0, 2, 3, 5])
    assert pairs == [(1, 2), (3, 5)]


def test_kept_pairs_of_a_student_of_full_depth_are_equal_layers():
    assert paired(Pairing(pairs="kept", count=2), (4, 4), None) == [(1, 1), (3, 3)]


@pytest.mark.parametrize("kept", [None, [0, 1], [0, 1, 2, 9]])
def test_kept_pairs_that_the_manifest_does_not_tell_are_an_error_with_a_remedy(kept):
    with pytest.raises(ConfigError, match="does not fit") as raised:
        paired(Pairing(pairs="kept"), (4, 6), kept)
    assert "proportional or cka" in raised.value.hint


@pytest.mark.parametrize("pair", [(4, 0), (0, 6), (4, 6)])
def test_a_pair_out_of_range_names_the_layer_and_the_range(pair):
    with pytest.raises(ConfigError, match=r"the pair \[\d, \d\] asks for layer") as raised:
        paired(Pairing(pairs=[(0, 0), pair]), (4, 6), None)
    assert "count from 0" in raised.value.hint


def test_more_layers_than_there_are_cannot_be_paired():
    with pytest.raises(ConfigError, match="5 layers are to be paired and the student has 4"):
        paired(Pairing(count=5), (4, 6), None)


@pytest.mark.parametrize(
    "settings",
    [
        {"pairs": [[0, 0]], "count": 1},
        {"pairs": [[0, 1], [0, 1]]},
        {"pairs": []},
        {"pairs": [[0, -1]]},
        {"pairs": "nearest"},
        {"count": 0},
    ],
)
def test_pairings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValidationError):
        Pairing.model_validate(settings)


@pytest.mark.parametrize("seed", range(10))
def test_pairs_by_similarity_are_the_best_of_all_that_never_go_back(seed):
    similarity = np.random.default_rng(seed).uniform(size=(5, 6))
    pairs = most_similar(Pairing(pairs="cka", count=3), similarity.tolist())
    layers = [layer for layer, _ in pairs]
    assert layers == spread(5, 3)
    best = max(
        sum(similarity[layer, column] for layer, column in zip(layers, columns, strict=True))
        for columns in itertools.combinations_with_replacement(range(6), 3)
    )
    assert sum(similarity[pair] for pair in pairs) == pytest.approx(best)
    assert [column for _, column in pairs] == sorted(column for _, column in pairs)


def test_a_pair_is_weak_below_nine_tenths_of_its_rows_best():
    similarity = [[1.0, 0.91, 0.5], [0.2, 0.4, 0.8]]
    found = judged([(0, 1), (0, 2), (1, 2), (1, 1)], similarity)
    assert [one.weak for one in found] == [False, True, False, True]
    assert (found[3].best_teacher, found[3].best_cka, found[3].cka) == (2, 0.8, 0.4)
