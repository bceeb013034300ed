"""Every registered family is found, taken apart and counted right."""

import subprocess
import sys

import pytest

from trt_kd.architectures import ARCHITECTURES, architecture_of
from trt_kd.architectures.shape import shape_from_config
from trt_kd.errors import ModelError

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


@pytest.fixture(params=ARCHITECTURES.names())
def model(request):
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **SIZES))


def test_an_unsupported_model_is_named_with_the_supported_ones_and_the_way_to_add_it():
    with pytest.raises(ModelError, match="'gpt2' is not supported; supported: llama") as caught:
        architecture_of("gpt2")
    assert "trt_kd/architectures" in caught.value.hint


def test_asking_for_an_architecture_needs_no_torch():
    code = (
        "import sys; from trt_kd.architectures import architecture_of; architecture_of('qwen3'); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_parameter_belongs_to_a_named_part(model):
    architecture = architecture_of(model.config.model_type)
    parts = [architecture.embedding(model), architecture.head(model)]
    parts += architecture.all_norms(model)
    for layer in architecture.layers(model):
        parts += [*architecture.mlp(layer), *architecture.attention(layer)]
    named = {id(parameter) for part in parts for parameter in part.parameters()}
    unnamed = [name for name, p in model.named_parameters() if id(p) not in named]
    assert [n for n in unnamed if "q_norm" not in n and "k_norm" not in n] == []


def test_readers_and_writers_are_the_linears_that_touch_the_residual_stream(model):
    architecture = architecture_of(model.config.model_type)
    for layer in architecture.layers(model):
        assert {linear.in_features for linear in architecture.readers(layer)} == {48}
        assert {linear.out_features for linear in architecture.writers(layer)} == {48}


def test_the_shape_counts_the_parameters_of_the_real_model(model):
    assert shape_from_config(model.config.to_dict()).parameters == model.num_parameters()


def test_kept_layers_are_renumbered_and_their_kinds_of_attention_kept():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        **SIZES | {"num_hidden_layers": 6},
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=3,
    )
    model = Qwen3ForCausalLM(config)
    architecture_of("qwen3").keep_layers(model, [0, 2, 4, 5])
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]
    assert config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert config.max_window_layers == 2
    assert config.num_hidden_layers == 4
