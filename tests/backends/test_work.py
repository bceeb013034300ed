"""What a step computes, against the operations that torch counts while it runs."""

import pytest

from trt_kd.architectures.shape import read_shape
from trt_kd.backends.base import work_of
from trt_kd.checkpoints import save_model
from trt_kd.measuring.roofline import prefill_flops


def counted(model, batch, tokens):
    """Operations of all products, as torch counts them; rotary frequencies left out."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.arange(batch * tokens).reshape(batch, tokens) % 512
    model.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(ids, logits_to_keep=1)
    return counter.get_total_flops() - tokens * model.config.head_dim


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 16), (3, 7)])
def test_a_prefill_does_what_torch_counts_half_of_it_in_attention(
    make_model, tokenizer_dir, tmp_path, tied, batch, tokens
):
    model = make_model(tie_word_embeddings=tied, num_hidden_layers=2)
    save_model(model, tmp_path, tokenizer_from=tokenizer_dir)
    shape = read_shape(tmp_path)
    work = work_of(shape, weight_bytes=4, kv_bytes=4)
    norms = shape.parts()["norms"]  # counted as weights by us, not as products by torch
    found = prefill_flops(work, batch_size=batch, tokens=tokens) - 2 * norms * batch * tokens
    above = batch * tokens * (tokens - 1) // 2  # pairs that eager attention computes and masks
    assert found + 4 * above * work.attention_channels == counted(model, batch, tokens)
