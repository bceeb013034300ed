"""A recipe over tiny models that passes through every stage in well under a minute."""

import pytest
import yaml

from trt_kd.pipeline import estimate


@pytest.fixture
def settings(teacher, text_file):
    """Settings of a whole recipe on the tiny teacher; tests change what they are about."""
    return {
        "name": "tiny",
        "data": {"source": {"kind": "text", "files": [str(text_file)]}, "block_tokens": 32},
        "import": {"source": str(teacher.path)},
        "prune": {"axes": [{"kind": "ffn", "size": 64}], "calibration_tokens": 128},
        "distill": {"steps": 4, "batch_size": 2, "checkpoint_every_steps": 2, "precision": "fp32"},
        "export": {
            "deploy": {"quantize": {"format": "fp8", "calibration_tokens": 64},
                       "lane": "hf-unified"},
        },
        "evaluate": {"blocks": 2, "tasks": ["facts"], "items": 8},
        "gates": [
            {"name": "small", "variant": "student", "metric": "parameters_share", "max": 0.9}
        ],
    }  # fmt: skip


@pytest.fixture(scope="session")
def llama_config():
    """Content of a plain Llama's config.json, of eight layers, by the width of its MLP."""

    def config(ffn):
        return {
            "model_type": "llama",
            "vocab_size": 8000,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "hidden_size": 512,
            "intermediate_size": ffn,
            "tie_word_embeddings": True,
        }

    return config


@pytest.fixture
def matrix_rate(monkeypatch):
    """Let a plan believe in this many FLOPs per second, and return them."""
    monkeypatch.setattr(estimate, "matrix_flops_per_s", lambda: 1e11)
    return 1e11


@pytest.fixture
def recipe_file(tmp_path):
    """Write settings to a recipe file and return its path."""

    def write(settings):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return path

    return write
