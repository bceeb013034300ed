"""Tiny decoders of every supported family, and calibration blocks."""

import numpy as np
import pytest

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="session")
def make_decoder(families):
    """Build a tiny random decoder of a model type; keyword arguments go into its config."""

    def make(model_type: str = "llama", **changes):
        plain = {"attention_bias": None, "mlp_bias": None} if model_type == "llama" else {}
        return families.tiny(model_type, **SIZES | plain | changes)

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
