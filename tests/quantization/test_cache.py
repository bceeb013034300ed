"""An FP8 key-value cache beside every format: its ranges are those of the unquantized model."""

import pytest
import torch

from trt_kd.checkpoints import load_model
from trt_kd.config import build_plugin
from trt_kd.errors import ModelError
from trt_kd.exporters.comparison import compare, logits_of
from trt_kd.quantization import FORMATS
from trt_kd.quantization.calibration import calibrate, quantizers

FORMS = [
    "fp8",
    "int8",
    "int8_smoothquant",
    {"kind": "int4_awq", "block_size": 64},
    {"kind": "mixed", "formats": ["fp8", "int8"], "effective_bits": 10.0, "score_tokens": 64},
]


@pytest.fixture(params=FORMS, ids=lambda form: form if isinstance(form, str) else form["kind"])
def both(request, teacher, blocks):
    """The teacher calibrated in one format without a cache and with one."""
    form = {"kind": request.param} if isinstance(request.param, str) else request.param
    models = []
    for changes in ({}, {"kv_cache": "fp8"}):
        models.append(load_model(teacher.path))
        calibrate(models[-1], build_plugin(FORMATS, form | changes), blocks)
    return models


def ranges(model):
    """Ranges of all enabled quantizers by name."""
    found = {name: q._amax.clone() for name, q in quantizers(model) if q.is_enabled}
    cache = {name: amax for name, amax in found.items() if "_bmm_" in name}
    return {name: amax for name, amax in found.items() if name not in cache}, cache


def cached(teacher, blocks):
    """Largest key and value of every layer that a stock model puts into its cache."""
    with torch.inference_mode():
        kept = load_model(teacher.path)(torch.as_tensor(blocks), use_cache=True).past_key_values
    return {
        f"model.layers.{layer}.self_attn.{part}_bmm_quantizer": states.abs().max()
        for layer, stored in enumerate(kept.layers)
        for part, states in (("k", stored.keys), ("v", stored.values))
    }


def test_a_cache_leaves_the_projections_alone(both):
    (plain, none), (beside, cache) = map(ranges, both)
    assert none == {}
    assert plain.keys() == beside.keys()
    assert all(torch.equal(plain[name], beside[name]) for name in plain)
    assert len(cache) == 2 * 4


def test_its_ranges_are_those_of_what_a_stock_model_caches(both, teacher, blocks):
    _, cache = ranges(both[1])
    expected = cached(teacher, blocks)
    assert cache.keys() == expected.keys()
    for name, amax in cache.items():
        assert float(amax) == pytest.approx(float(expected[name]), rel=0.01)


def test_a_cache_costs_something_of_its_own(both, blocks):
    difference = compare(list(logits_of(both[0], blocks)), logits_of(both[1], blocks))
    assert 0 < difference.kl_nats < 0.1


def test_attention_without_a_place_for_a_cache_is_an_error(make_model, blocks, monkeypatch):
    """Every quantizer of keys and values is counted; one that stays away is not passed over."""
    plugin = build_plugin(FORMATS, {"kind": "fp8", "kv_cache": "fp8"})
    settings = plugin.cache_settings()
    settings[0]["quantizer_name"] = "*layers.1*[kv]_bmm_quantizer"
    monkeypatch.setattr(type(plugin), "cache_settings", lambda _: settings)
    with pytest.raises(ModelError, match="2 of the 8 keys and values of this llama"):
        calibrate(make_model(), plugin, blocks)
