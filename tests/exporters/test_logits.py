import numpy as np
import torch

from trt_kd.exporters.comparison import logits_of


def test_blocks_that_share_a_pass_have_the_logits_they_have_alone(make_model, monkeypatch):
    blocks = np.random.default_rng(2).integers(0, 512, (5, 16))
    model = make_model()
    monkeypatch.setattr("trt_kd.exporters.comparison._TOKENS", 32)
    found = list(logits_of(model, blocks))
    assert [logits.shape for logits in found] == [(1, 16, 512)] * 5
    for block, logits in zip(blocks, found, strict=True):
        with torch.inference_mode():
            alone = model(torch.as_tensor(block)[None]).logits
        torch.testing.assert_close(torch.as_tensor(logits), alone)
