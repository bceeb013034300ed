"""A plan's estimates of time, at the matrix rate that a record speaks of, beside its seconds."""

import json
from pathlib import Path

import pytest

from trt_kd.architectures.shape import shape_from_config
from trt_kd.measuring.roofline import DecodeWork, best_s, prefill_flops
from trt_kd.pipeline import estimate as module
from trt_kd.stages.distill import DistillConfig
from trt_kd.stages.prune import PruneConfig

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "tie_word_embeddings": True,
}
WITHIN = 2.0
"""Factor to the record at most: what docs/estimates.md promises."""


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def quickstart():
    return read("quickstart")


@pytest.fixture(scope="module")
def variants(quickstart):
    return {one["role"]: one for one in quickstart["variants"]}


@pytest.fixture(scope="module")
def shapes(variants):
    """Student and teacher."""
    found = tuple(shape_from_config(SMOLLM2 | {"intermediate_size": n}) for n in (896, 1536))
    recorded = [variants[role]["parameters"] for role in ("student", "teacher")]
    assert [one.parameters for one in found] == recorded
    return found


@pytest.fixture
def at_the_recorded_rate(variants, shapes, monkeypatch):
    """The float32 rate behind the floor of the teacher's prefill, which arithmetic sets."""
    speed, teacher = variants["teacher"]["speed"][0], shapes[1]
    assert speed["prefill_bound"] == "compute"
    work = DecodeWork(
        weight_bytes=4 * teacher.parameters,
        weights=teacher.parameters,
        kv_bytes_per_token=0.0,
        head_weights=teacher.vocab * teacher.hidden,
        attention_channels=teacher.layers * teacher.heads * teacher.head_dim,
    )
    flops = prefill_flops(work, batch_size=1, tokens=speed["input_tokens"])
    rate = flops / (1e-3 * speed["prefill_floor_ms"])
    monkeypatch.setattr(module, "matrix_flops_per_s", lambda: rate)


def said(stage, config, shapes):
    """Seconds of the work, without loading libraries."""
    time_s, _, _ = module._COSTS[stage](config, *shapes)
    return time_s


def near(found, recorded):
    return recorded / WITHIN <= found <= recorded * WITHIN


@pytest.mark.usefixtures("at_the_recorded_rate")
@pytest.mark.parametrize("role", ["student", "cross_entropy"])
def test_trainings_of_the_quickstart_take_what_is_said(quickstart, variants, shapes, role):
    config = DistillConfig.model_validate(quickstart["recipe"]["distill"] | {"monitor": None})
    config = config.cross_entropy() if role == "cross_entropy" else config
    assert config.sequences * config.data.block_tokens == quickstart["training"]["tokens"]
    assert near(said("distill", config, shapes), variants[role]["seconds"]["model"])


@pytest.mark.usefixtures("at_the_recorded_rate")
def test_the_cut_of_the_quickstart_takes_what_is_said(quickstart, variants, shapes):
    config = PruneConfig.model_validate(quickstart["recipe"]["prune"])
    assert near(said("prune", config, shapes), variants["pruned"]["seconds"]["model"])


@pytest.mark.usefixtures("at_the_recorded_rate")
def test_a_training_step_takes_what_is_said(quickstart, shapes):
    """Another record of the same kind of machine, which does not hold the float32 rate itself."""
    record = read("kd_step")
    if any(record["hardware"][n] != quickstart["environment"][n] for n in ("processor", "cores")):
        pytest.skip("the two records are of different machines")
    workload = record["workload"]
    assert workload["parameters"]["student"] == shapes[0].parameters
    config = DistillConfig.model_validate(
        {
            "data": {"block_tokens": workload["block_tokens"]},
            "batch_size": workload["batch"],
            "steps": 1,
            "warmup_steps": 0,
            "monitor": None,
        }
    )
    (online,) = (one for one in record["results"] if one["name"] == "online")
    assert near(said("distill", config, shapes), online["median_s"])


def test_other_work_on_the_machine_hardly_changes_a_rate_that_is_the_best_of_many():
    def best(times, **limits):
        ticks = [tick for time in times for tick in (0.0, time)]
        return best_s(lambda: None, len(times), clock=iter(ticks).__next__, **limits)

    assert best([0.9, 0.8, 0.1, 0.7]) == 0.1
    assert best([0.9, 0.8, 0.1, 0.7], limit_s=1.0) == 0.8
    assert best([0.9, 0.1], limit_s=0.5) == 0.9
