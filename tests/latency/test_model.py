"""The latency model: exact where time is what it assumes, honest where it is not."""

import numpy as np
import pytest

from trt_kd.architectures.shape import ModelShape
from trt_kd.errors import ModelError
from trt_kd.latency.model import LatencyModel, Timed
from trt_kd.latency.operators import METRICS, OPERATORS, amounts, experts_read
from trt_kd.latency.table import Cell, Row, drift_corrected

SHAPE = ModelShape(
    model_type="llama",
    layers=30,
    hidden=576,
    ffn=1536,
    heads=9,
    kv_heads=3,
    head_dim=64,
    vocab=49152,
    tied=True,
)
MIXTURE = SHAPE.with_sizes(ffn=0, experts=16, experts_per_token=4, expert_ffn=256)
MIXTURE_SIZES = [
    {},
    {"layers": 20},
    {"experts": 8},
    {"expert_ffn": 128},
    {"experts": 8, "expert_ffn": 192},
    {"heads": 6, "kv_heads": 2},
    {"heads": 6},
    {"hidden": 448},
    {"layers": 24, "experts": 10, "expert_ffn": 160},
    {"layers": 20, "experts": 8, "expert_ffn": 128, "hidden": 512},
]
INPUT_TOKENS = 16
TRUE = {
    "step": 1.5,
    "layer": 0.05,
    "attention": 3e-8,
    "mlp": 2e-8,
    "head": 1e-8,
    "context": 1e-5,
    "router": 2e-8,
    "experts": 3e-8,
    "routed": 1e-8,
}
SIZES = [
    {},
    {"layers": 20},
    {"ffn": 768},
    {"heads": 6, "kv_heads": 2},
    {"heads": 6},
    {"hidden": 448},
    {"layers": 24, "ffn": 1024},
    {"layers": 20, "ffn": 768, "heads": 6, "kv_heads": 2, "hidden": 448},
    {"layers": 27, "ffn": 1280, "hidden": 512},
]


def true_ms(shape, metric, batch):
    tokens = batch * INPUT_TOKENS if metric == "ttft_ms" else batch
    units = amounts(shape, metric, tokens)
    return sum(TRUE[name] * units[name] for name in units) * (1 + 0.2 * batch)


def made(sizes=SIZES, noise=0.0, batches=(1, 4, 8), source=SHAPE):
    rng = np.random.default_rng(0)
    return LatencyModel(
        "int4",
        [
            Timed(
                shape,
                {
                    (metric, batch): true_ms(shape, metric, batch)
                    * (1 + noise * rng.standard_normal())
                    for metric in METRICS
                    for batch in batches
                },
            )
            for shape in (source.with_sizes(**one) for one in sizes)
        ],
        input_tokens=INPUT_TOKENS,
    )


def test_every_amount_is_a_known_operator():
    for metric in METRICS:
        assert list(amounts(MIXTURE, metric)) == list(OPERATORS)
        assert amounts(SHAPE, metric).keys() == OPERATORS.keys() - {"router", "experts", "routed"}


def test_weights_are_those_of_the_parts():
    units, parts = amounts(SHAPE, "itl_ms"), SHAPE.parts()
    assert units["attention"] == parts["attention"]
    assert units["mlp"] == parts["mlp"]
    assert units["head"] == parts["embedding"]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("batch", [1, 4, 8])
def test_times_that_are_sums_over_operators_are_predicted_exactly(metric, batch):
    model = made()
    unseen = SHAPE.with_sizes(layers=22, ffn=896, heads=6, kv_heads=2, hidden=512)
    assert model.predict(metric, unseen, batch) == pytest.approx(true_ms(unseen, metric, batch))
    assert model.error(metric, batch) < 1e-6


def test_between_batch_sizes_times_are_interpolated():
    model = made()
    expected = true_ms(SHAPE, "itl_ms", 6)
    assert model.predict("itl_ms", SHAPE, 6) == pytest.approx(expected)
    assert model.measured("itl_ms", 6) == pytest.approx(expected)


def test_the_stated_error_is_about_the_real_one():
    noisy = made(SIZES * 3, noise=0.05)
    unseen = [SHAPE.with_sizes(layers=n, ffn=f) for n in (21, 25, 29) for f in (832, 1088, 1472)]
    real = [
        abs(noisy.predict("itl_ms", shape, 4) / true_ms(shape, "itl_ms", 4) - 1) for shape in unseen
    ]
    assert np.median(real) < 2 * noisy.error("itl_ms", 4)
    assert 0.01 < noisy.error("itl_ms", 4) < 0.1


def test_arrays_of_sizes_give_arrays_of_times_infinite_where_nothing_was_measured():
    sizes = np.array([768, 1024, 1536, 512])
    ms = made().predict("itl_ms", SHAPE.with_sizes(ffn=sizes), 4)
    alone = [made().predict("itl_ms", SHAPE.with_sizes(ffn=int(size)), 4) for size in sizes[:3]]
    assert ms[:3].tolist() == pytest.approx(alone)
    assert ms[3] == np.inf


@pytest.mark.parametrize("sizes", [{"ffn": 512}, {"layers": 31}, {"hidden": 384}])
def test_sizes_that_were_not_measured_are_refused(sizes):
    with pytest.raises(ModelError, match="was not measured in the lane int4"):
        made().predict("itl_ms", SHAPE.with_sizes(**sizes), 4)


@pytest.mark.parametrize("batch", [16])
def test_batch_sizes_beyond_the_table_are_refused(batch):
    with pytest.raises(ModelError, match="batch size 16 is beyond the latency table's 1, 4, 8"):
        made().predict("itl_ms", SHAPE, batch)


def test_an_operator_that_never_changed_is_part_of_the_step():
    model = made([{}, {"layers": 20}, {"ffn": 768}, {"layers": 24, "ffn": 1024}])
    fit = model.fits["itl_ms", 1]
    assert "head" not in fit.ms_per_unit
    unseen = SHAPE.with_sizes(layers=22)
    assert fit.predict(unseen) == pytest.approx(true_ms(unseen, "itl_ms", 1))


def test_no_operator_takes_less_than_no_time():
    for fit in made(noise=0.3).fits.values():
        assert min(fit.ms_per_unit.values()) >= 0


@pytest.mark.parametrize(("experts", "per_token", "tokens"), [(8, 2, 1), (8, 2, 5), (6, 3, 4)])
def test_the_experts_that_a_step_reads_are_those_that_chance_gives(experts, per_token, tokens):
    rng = np.random.default_rng(0)
    picks = rng.random((20_000, tokens, experts)).argsort(-1)[..., :per_token]
    read = np.mean([len(set(step.ravel().tolist())) for step in picks])
    assert experts_read(experts, per_token, tokens) == pytest.approx(read, rel=0.01)


def test_one_token_reads_what_it_passes_through_and_many_read_every_expert():
    one, many = (amounts(MIXTURE, "itl_ms", tokens) for tokens in (1, 10_000))
    assert one["experts"] == pytest.approx(one["routed"])
    assert many["experts"] == pytest.approx(MIXTURE.parts()["experts"])
    assert one["router"] == MIXTURE.parts()["router"]
    assert one["mlp"] == MIXTURE.parts()["mlp"]
    active = one["routed"] + one["router"] + one["mlp"] + one["attention"] + one["head"]
    assert active == pytest.approx(MIXTURE.active_parameters - MIXTURE.parts()["norms"])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dense_layers", [0, 2])
def test_a_mixture_of_experts_is_predicted_within_what_was_measured(metric, dense_layers):
    source = MIXTURE.with_sizes(dense_layers=dense_layers, ffn=64 * dense_layers)
    model = made(MIXTURE_SIZES, source=source)
    unseen = source.with_sizes(experts=12, expert_ffn=224, layers=20)
    assert model.predict(metric, unseen, 4) == pytest.approx(true_ms(unseen, metric, 4))
    sizes = np.array([16, 12, 2])
    ms = model.predict(metric, source.with_sizes(experts=sizes), 4)
    assert ms[:2].tolist() == pytest.approx(
        [model.predict(metric, source.with_sizes(experts=int(size)), 4) for size in sizes[:2]]
    )
    assert ms[2] == np.inf
    with pytest.raises(ModelError, match="experts 2 "):
        model.predict(metric, source.with_sizes(experts=2), 4)


def test_fewer_experts_save_prefill_and_large_batches_and_nothing_of_a_single_token():
    fewer = MIXTURE.with_sizes(experts=8)
    for tokens, saves in ((1, False), (8, True), (256, True)):
        read = [amounts(shape, "itl_ms", tokens)["experts"] for shape in (MIXTURE, fewer)]
        assert (read[0] > 1.01 * read[1]) is saves


def cell(ms, batch=4):
    times = {"p50": ms, "p90": 1.1 * ms, "p99": 1.2 * ms}
    lengths = {"input_tokens": INPUT_TOKENS, "output_tokens": 8}
    return Cell(batch_size=batch, **lengths, ttft_ms=times, itl_ms=times, spread=0.01)


def test_a_slower_hour_is_taken_out_of_the_probes_times():
    quick, slow = (
        Row(sizes={"ffn": 768}, cells=[cell(50.0)]),
        Row(sizes={"ffn": 768}, cells=[cell(100.0)]),
    )
    rows = drift_corrected([([cell(80.0)], [quick]), ([cell(160.0)], [slow])])
    assert rows[0].sizes == {}
    assert rows[0].cells[0].itl_ms["p50"] == 120.0
    assert [row.cells[0].itl_ms["p50"] for row in rows[1:]] == [75.0, 75.0]
    assert rows[1].cells[0].ttft_ms["p99"] == pytest.approx(90.0)
