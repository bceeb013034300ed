"""Every family through every lane that says it takes it; the table of docs/lanes.md, held to."""

import numpy as np
import pytest

from trt_kd.architectures import ARCHITECTURES
from trt_kd.architectures.shape import read_shape
from trt_kd.artifacts import Artifact, writing
from trt_kd.checkpoints import save_model
from trt_kd.config import StageConfig
from trt_kd.exporters import EXPORTERS
from trt_kd.exporters.verification import source_logits, verify

BLOCKS = np.random.default_rng(1).integers(1, 500, (2, 24))
LANES = {
    "hf-unified": {},
    "ort-genai": {"precision": "fp32"},
    "tensorrt-rtx": {
        "compute_capabilities": ["8.9"],
        "input_tokens": 32,
        "max_tokens": 64,
        "max_batch": 2,
    },
}
"""Lanes whose own tests do not go through their families, with quick settings."""
PACKAGES = {"ort-genai": "onnxruntime_genai", "tensorrt-rtx": "tensorrt_rtx"}


class Made(StageConfig):
    stage = "import"


@pytest.fixture(scope="module")
def checkpoint(families, tokenizer_dir, tmp_path_factory):
    """A tiny checkpoint of a family, made when first asked for, and its logits."""
    made = {}

    def make(family: str):
        if family not in made:
            out = tmp_path_factory.mktemp("families") / family
            with writing(out, kind="checkpoint", config=Made(), inputs={}) as draft:
                model = families.tiny(family, num_hidden_layers=2, **one_layer_lists(family))
                save_model(model, draft.path, tokenizer_from=tokenizer_dir)
            source = Artifact.open(out)
            made[family] = source, source_logits(source, BLOCKS)
        return made[family]

    return make


@pytest.fixture(autouse=True)
def in_a_fork(forks, monkeypatch):
    """The builder of ONNX Runtime GenAI, without loading its libraries for every family."""
    monkeypatch.setattr("trt_kd.exporters.ort_genai.subprocess", forks)


def one_layer_lists(family: str) -> dict:
    """Settings that count layers, for two of them; Mistral as it is now, without a window."""
    return {
        "mistral": {"sliding_window": None},
        "qwen2": {"max_window_layers": 1},
        "qwen3": {"max_window_layers": 1},
        "smollm3": {"no_rope_layers": [1, 0]},
    }.get(family, {})


@pytest.mark.slow
@pytest.mark.parametrize("family", ARCHITECTURES.names())
@pytest.mark.parametrize("kind", LANES)
def test_a_family_that_a_lane_takes_keeps_its_logits_there(checkpoint, kind, family, tmp_path):
    lane = EXPORTERS.load(kind).model_validate({"kind": kind, **LANES[kind]})
    source, reference = checkpoint(family)
    if problems := lane.check(read_shape(source.path), "checkpoint"):
        assert any(family in problem for problem in problems), "a refusal has its reason"
        return
    if kind in PACKAGES:
        pytest.importorskip(PACKAGES[kind])
    lane.export(source, tmp_path)
    difference = verify(lane, source, tmp_path, BLOCKS, reference)
    assert difference.kl_nats < lane.kl_limit_nats(source)
    assert difference.top1_agreement > 0.9
