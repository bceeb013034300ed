"""Exports of the tiny teacher, made once."""

import numpy as np
import pytest

from trt_kd.artifacts import Artifact, writing
from trt_kd.checkpoints import load_model
from trt_kd.config import StageConfig, build_plugin
from trt_kd.quantization import FORMATS

CALIBRATED = {
    "fp8": "fp8",
    "fp8_per_channel_per_token": "fp8_per_channel_per_token",
    "w4a8_awq": {"kind": "w4a8_awq", "block_size": 64},
    "int8_smoothquant": "int8_smoothquant",
    "int8": "int8",
    "int4_awq": {"kind": "int4_awq", "block_size": 64},
    "fp8 with cache": {"kind": "fp8", "kv_cache": "fp8"},
    "int8_smoothquant with cache": {"kind": "int8_smoothquant", "kv_cache": "fp8"},
    "int4_awq with cache": {"kind": "int4_awq", "block_size": 64, "kv_cache": "fp8"},
    "fp8_cache": {"kind": "recipe", "name": "fp8_default-kv_fp8"},
    "mixed": {
        "kind": "mixed",
        "formats": ["fp8", {"kind": "int4_awq", "block_size": 64}],
        "effective_bits": 6.5,
        "method": "kl_div",
        "score_tokens": 64,
    },
}


class Made(StageConfig):
    stage = "quantize"
    format: dict


@pytest.fixture(scope="session")
def blocks():
    """Token ids ``[3, 32]``."""
    return np.random.default_rng(1).integers(1, 512, (3, 32))


@pytest.fixture(scope="session")
def quantized(teacher, blocks, tmp_path_factory):
    """Quantized artifacts of the teacher by format, each made when first asked for."""
    from trt_kd.exporters.comparison import compare, logits_of
    from trt_kd.quantization.calibration import calibrate
    from trt_kd.quantization.storage import save_quantized

    made: dict[str, Artifact] = {}

    def make(name: str) -> Artifact:
        if name not in made:
            plugin = build_plugin(FORMATS, CALIBRATED[name])
            model = load_model(teacher.path)
            before = list(logits_of(model, blocks))
            kept = calibrate(model, plugin, blocks)
            kl = compare(before, logits_of(model, blocks)).kl_nats
            out = tmp_path_factory.mktemp("quantized") / name
            config = Made(format=plugin.model_dump())
            with writing(out, kind="quantized", config=config, inputs={}) as draft:
                save_quantized(model, teacher, draft.path, kept)
                draft.metrics |= {"kl_to_source_nats": kl, "layer_formats": kept.get("chosen")}
            made[name] = Artifact.open(out)
        return made[name]

    return make
