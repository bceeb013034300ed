"""Tiny decoders of every supported family, and calibration blocks."""

import numpy as np
import pytest

SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.1,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="session")
def make_decoder():
    """Build a tiny random decoder of a model type; keyword arguments go into its config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(model_type: str = "llama", **changes):
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **SIZES | changes)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():  # norms and biases start as ones and zeros, which hides mistakes
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture(scope="session")
def blocks():
    """Token ids ``[6, 32]``."""
    return np.random.default_rng(0).integers(0, 512, (6, 32))


@pytest.fixture(scope="session")
def logits():
    """Logits of a model on blocks of token ids."""
    import torch

    def run(model, blocks):
        with torch.no_grad():
            return model(input_ids=torch.from_numpy(blocks), use_cache=False).logits

    return run
