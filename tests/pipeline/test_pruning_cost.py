"""What a plan says of folds: as many as there can be, and all that each of them computes."""

import pytest

from trt_kd.architectures.shape import shape_from_config
from trt_kd.pipeline import estimate as module
from trt_kd.pipeline.pruning_cost import fold_flops, folds, proof_tokens
from trt_kd.pruning.reconstruction import SHARES, proof_sequences
from trt_kd.stages.prune import PruneConfig
from trt_kd.stages.score import ScoreConfig

SEQUENTIAL = {"schedule": "sequential"}


@pytest.fixture(scope="module")
def shape(llama_config):
    return shape_from_config(llama_config(1536))


def settings(axis, **changes):
    plain = {"reconstruct": SEQUENTIAL, "calibration_tokens": 4096}
    return PruneConfig.model_validate(plain | changes | {"axes": [{"kind": "depth"} | axis]})


@pytest.mark.parametrize(
    "drop", [[1], [1, 2], [1, 3], [0], [0, 1, 4], [6, 7], [2, 3, 5, 6], [1, 3, 5, 7]]
)
def test_named_layers_leave_the_gaps_that_the_refit_finds(shape, drop):
    from trt_kd.pruning.sequential import spans

    kept = [n for n in range(shape.layers) if n not in drop]
    gaps = [end for index, end in spans(kept, shape.layers) if end > index + 1]
    assert folds(settings({"drop": drop}), shape, len(drop)) == len(gaps)


def test_a_run_is_one_gap_and_single_layers_are_one_each_at_most(shape):
    assert folds(settings({"layers": 5, "contiguous": True}), shape, 3) == 1
    assert folds(settings({"layers": 5}), shape, 3) == 3
    assert folds(settings({"layers": 2}), shape, 6) == 2  # as many as stay
    assert folds(settings({"layers": 8}), shape, 0) == 0


@pytest.mark.parametrize("reconstruct", [None, {"schedule": "once"}])
def test_nothing_is_folded_but_layer_after_layer(shape, reconstruct):
    config = settings({"layers": 5}, reconstruct=reconstruct)
    assert folds(config, shape, 3) == fold_flops(config, shape, 3) == 0
    assert proof_tokens(config, shape, 3) == 0


def test_a_fold_is_a_gram_matrix_its_solutions_and_passes_that_prove_it(shape):
    config = settings({"drop": [3]}, reconstruct=SEQUENTIAL | {"ridges": [0.1]})
    gram = 2 * 4096 * 1536 * (1536 + 512)
    solution = 1536**3 / 3 + 2 * 512 * 1536**2
    assert fold_flops(config, shape, 1) == pytest.approx(gram + len(SHARES) * solution)
    held = proof_sequences(config.blocks()) * config.data.block_tokens
    assert proof_tokens(config, shape, 1) == (2 + len(SHARES)) * held


@pytest.mark.usefixtures("matrix_rate")
@pytest.mark.parametrize("more", [{"layers": 5}, {"layers": 6, "calibration_tokens": 8192}])
def test_more_to_fold_takes_longer(shape, more):
    changes = {k: v for k, v in more.items() if k != "layers"}
    one, other = settings({"layers": 6}), settings({"layers": more["layers"]}, **changes)
    seconds = [
        module._COSTS["prune"](config, config.planned(shape), shape)[0] for config in (one, other)
    ]
    assert seconds[0] < seconds[1]


@pytest.mark.usefixtures("matrix_rate")
def test_cuts_that_are_measured_for_a_search_count_their_folds(shape):
    plain = {"axes": [{"kind": "depth"}, {"kind": "ffn"}], "reconstruct": SEQUENTIAL}
    config = ScoreConfig.model_validate(plain)
    found = module._COSTS["score"](config, shape, shape)[0]
    expected = module.forward_s(shape, config.calibration_tokens + config.check_tokens)
    for axis, size in config.cuts(shape):
        cut = config.cut(axis, size)
        dropped = shape.layers - size if axis.kind == "depth" else 0
        expected += module.START_S + module.forward_s(shape, config.check_tokens)
        expected += module._cut_s(cut, shape, dropped)
    assert found == pytest.approx(expected)
