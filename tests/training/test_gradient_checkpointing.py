"""Keeping the inputs of layers only: the same training from less memory."""

import torch
from safetensors.torch import load_file

from trt_kd.stages.distill import DistillConfig, distill


def run(text_file, teacher, out, *, keep_inputs_only):
    """The trained weights, and the bytes that forward passes kept for the way back."""
    kept = [0]

    def pack(tensor):
        kept[0] += tensor.nbytes
        return tensor

    config = DistillConfig.model_validate(
        {
            "data": {"source": {"kind": "text", "files": [str(text_file)]}, "block_tokens": 64},
            "steps": 2,
            "batch_size": 4,
            "precision": "fp32",
            "loss": "reverse_kl",
            "task_weight": 0.5,
            "gradient_checkpointing": keep_inputs_only,
        }
    )
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made = distill(config, student=teacher, teacher=teacher, out=out)
    return load_file(made.path / "model.safetensors"), kept[0]


def test_gradient_checkpointing_gives_the_same_weights_from_less_memory(
    text_file, teacher, tmp_path
):
    plain, everything = run(text_file, teacher, tmp_path / "plain", keep_inputs_only=False)
    checkpointed, outside = run(text_file, teacher, tmp_path / "less", keep_inputs_only=True)
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=0)
    layers, tokens, hidden, steps, float32 = 4, 4 * 64, 64, 2, 4
    inputs_of_layers = layers * tokens * hidden * float32 * steps
    assert outside + inputs_of_layers < 0.3 * everything
