"""A tiny model quantized in every format that this machine can calibrate."""

import numpy as np
import pytest

from trt_kd.config import build_plugin
from trt_kd.quantization import FORMATS

AWQ = {"kind": "int4_awq", "block_size": 64}
MIXED = {"kind": "mixed", "formats": ["fp8", AWQ], "effective_bits": 7.0, "score_tokens": 64}
CACHED = {"kind": "int8_smoothquant", "kv_cache": "fp8"}
W4A8 = {"kind": "w4a8_awq", "block_size": 64}
CALIBRATED = [
    *("fp8", "fp8_per_channel_per_token", "int8_smoothquant", "int8"),
    *(AWQ, W4A8, MIXED, CACHED),
]


def _named(settings):
    if isinstance(settings, str):
        return settings
    return settings["kind"] + " with cache" * ("kv_cache" in settings)


@pytest.fixture(params=CALIBRATED, ids=_named)
def calibrated(request):
    """One format that needs no GPU."""
    return build_plugin(FORMATS, request.param)


@pytest.fixture(scope="session")
def blocks():
    """Token ids ``[6, 32]``."""
    return np.random.default_rng(0).integers(1, 512, (6, 32))
