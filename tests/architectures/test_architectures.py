"""Every registered family is found, taken apart, counted right and saved for both versions."""

import subprocess
import sys
from dataclasses import replace

import pytest
from transformers import __version__

from trt_kd.architectures import ARCHITECTURES, architecture_of
from trt_kd.architectures.base import AXES
from trt_kd.architectures.shape import ModelShape, shape_from_config
from trt_kd.errors import ModelError
from trt_kd.pruning import AXES as REGISTERED


@pytest.fixture(params=ARCHITECTURES.names())
def model(request, families):
    return families.tiny(request.param)


def test_an_unsupported_model_is_named_with_the_supported_ones_and_the_way_to_add_it():
    with pytest.raises(ModelError, match="'gpt2' is not supported; supported: llama") as caught:
        architecture_of("gpt2")
    assert "trt_kd/architectures" in caught.value.hint


def test_asking_for_an_architecture_and_its_axes_needs_no_torch():
    code = (
        "import sys; from trt_kd.architectures import ARCHITECTURES, architecture_of\n"
        "from trt_kd.architectures.shape import ModelShape\n"
        "shape = ModelShape('x', 2, 64, 96, 4, 2, 16, 512, True)\n"
        "for name in ARCHITECTURES.names():\n"
        "    architecture_of(name).axes(shape), architecture_of(name).check_shape(shape)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_registered_axis_is_one_that_families_have_or_lack():
    assert set(REGISTERED.names()) <= set(AXES)
    for name in ARCHITECTURES.names():
        assert set(architecture_of(name).lacks) <= set(AXES)


def test_every_parameter_lies_along_an_axis_or_is_a_norm_of_one_head(model):
    architecture = architecture_of(model.config.model_type)
    slices = [(architecture.embedding(model), "weight"), (architecture.head(model), "weight")]
    slices += [(architecture.final_norm(model), name) for name in ("weight", "bias")]
    for layer in architecture.layers(model):
        found = list(architecture.residual(layer))
        mlp, experts = architecture.mlp(layer), architecture.experts(layer)
        assert (mlp is None) != (experts is None)
        attention = architecture.attention(layer)
        found += [*attention.query, *attention.key_value]
        found += mlp.makers if mlp else experts.residual
        slices += [(entry.module, entry.name) for entry in found]
    named = {id(getattr(module, name, None)) for module, name in slices}
    unnamed = [name for name, p in model.named_parameters() if id(p) not in named]
    assert [n for n in unnamed if not n.endswith(("q_norm.weight", "k_norm.weight"))] == []


def test_slices_fit_their_parameters(model):
    architecture = architecture_of(model.config.model_type)
    shape = shape_from_config(model.config.to_dict())
    for layer in architecture.layers(model):
        attention = architecture.attention(layer)
        assert (attention.heads, attention.kv_heads) == (shape.heads, shape.kv_heads)
        for entry in architecture.residual(layer):
            size = entry.module.get_parameter(entry.name).shape[entry.dim]
            assert (entry.units, entry.start + entry.units * entry.width) == (shape.hidden, size)
        for entry in (*attention.query, *attention.key_value):
            size = entry.module.get_parameter(entry.name).shape[entry.dim]
            assert entry.start + entry.units * entry.width <= size


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ARCHITECTURES.names())
def test_the_shape_counts_the_parameters_of_the_real_model(model_type, tied, families):
    model = families.tiny(model_type, tie_word_embeddings=tied)
    shape = shape_from_config(model.config.to_dict())
    assert shape.parameters == model.num_parameters()
    assert sum(shape.parts().values()) == shape.parameters
    assert shape.active_parameters <= shape.parameters


BIASES = {
    **dict.fromkeys(("llama", "smollm3"), ("attention_bias", "mlp_bias")),
    **dict.fromkeys(("qwen3", "qwen3_moe", "olmo2", "gemma2", "gemma3_text", "gpt_neox"),
                    ("attention_bias",)),
}  # fmt: skip
"""The options of a family that give its linears biases."""


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("model_type", BIASES)
def test_biases_are_counted_where_the_family_has_them(model_type, value, families):
    model = families.tiny(model_type, **dict.fromkeys(BIASES[model_type], value))
    assert any(name.endswith("proj.bias") for name, _ in model.named_parameters()) == (
        value and model_type != "gpt_neox"
    )
    assert shape_from_config(model.config.to_dict()).parameters == model.num_parameters()


QWEN = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
PUBLISHED = [
    (
        "llama",  # Llama 3.2 1B
        1_235_814_400,
        {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
         "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
         "tie_word_embeddings": True},
    ),
    (
        "mistral",  # Mistral 7B 0.1
        7_241_732_096,
        {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    ),
    (
        "qwen2",  # Qwen2 0.5B
        494_032_768,
        {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
         "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
         "tie_word_embeddings": True},
    ),
    (
        "gemma2",  # Gemma 2 2B, whose config says neither that it is tied nor its head size
        2_614_341_888,
        {"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
         "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4},
    ),
    (
        "gemma3_text",  # Gemma 3 1B
        999_885_952,
        {"vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912,
         "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1},
    ),
    (
        "phi3",  # Phi-3 mini
        3_821_079_552,
        {"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
    ),
    (
        "gpt_neox",  # Pythia 70M
        70_426_624,
        {"vocab_size": 50304, "hidden_size": 512, "intermediate_size": 2048,
         "num_hidden_layers": 6, "num_attention_heads": 8},
    ),
    (
        "mixtral",  # Mixtral 8x7B
        46_702_792_704,
        {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
         "num_local_experts": 8},
    ),
    (
        "qwen3_moe",  # Qwen3 30B A3B
        30_532_122_624,
        {**QWEN, "vocab_size": 151936, "intermediate_size": 6144, "num_hidden_layers": 48,
         "num_experts": 128, "moe_intermediate_size": 768},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "count", "config"), PUBLISHED)
def test_published_models_are_counted_from_their_config_alone(model_type, count, config):
    assert shape_from_config({"model_type": model_type, **config}).parameters == count


@pytest.mark.parametrize(
    ("config", "window", "layers"),
    [
        ({"model_type": "gemma2"}, 4096, 2),
        ({"model_type": "gemma3_text", "num_hidden_layers": 13}, 4096, 11),
        ({"model_type": "mistral"}, 4096, 4),
        ({"model_type": "mistral", "sliding_window": None}, 0, 0),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": False}, 0, 0),
        (
            {"model_type": "qwen3", "sliding_window": 64, "use_sliding_window": True,
             "max_window_layers": 1}, 64, 3,
        ),
        ({"model_type": "smollm3", "sliding_window": 64, "use_sliding_window": True}, 64, 1),
        ({"model_type": "llama", "sliding_window": 64}, 0, 0),
    ],
)  # fmt: skip
def test_layers_with_a_window_are_counted_as_the_library_builds_them(config, window, layers):
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96,
             "num_hidden_layers": 4, "num_attention_heads": 4}  # fmt: skip
    shape = shape_from_config(sizes | config)
    assert (shape.window, shape.window_layers) == (window, layers)


def test_the_windows_of_the_shape_are_those_of_the_model(model):
    shape = shape_from_config(model.config.to_dict())
    kinds = getattr(model.config, "layer_types", None)
    if kinds is not None:
        assert shape.window_layers == list(kinds).count("sliding_attention")


LLAMA = ModelShape("llama", 4, 576, 1536, 9, 3, 64, 512, True)


def test_a_hidden_size_that_the_config_refuses_is_named_with_its_neighbours():
    llama = architecture_of("llama")
    llama.check_shape(LLAMA)
    llama.check_shape(replace(LLAMA, hidden=512, heads=8))
    architecture_of("mistral").check_shape(replace(LLAMA, hidden=512))
    with pytest.raises(ModelError, match="hidden size 512 is no multiple of 9") as caught:
        llama.check_shape(replace(LLAMA, hidden=512))
    assert "504 and 513" in caught.value.hint


@pytest.mark.skipif(__version__.startswith("4"), reason="4.57 accepts any hidden size")
@pytest.mark.parametrize("model_type", ARCHITECTURES.names())
def test_what_is_refused_is_what_the_library_refuses(model_type):
    from huggingface_hub.errors import StrictDataclassClassValidationError
    from transformers import AutoConfig

    architecture = architecture_of(model_type)
    refused = architecture.whole_heads or model_type == "gpt_neox"
    sizes = {"hidden_size": 60, "num_attention_heads": 16, "head_dim": 8}
    shape = replace(LLAMA, model_type=model_type, hidden=60, heads=16)
    shape = replace(shape, derived_head_dim=model_type == "gpt_neox")
    if not refused:
        AutoConfig.for_model(model_type, **sizes)
        architecture.check_shape(shape)
        return
    with pytest.raises(StrictDataclassClassValidationError):
        AutoConfig.for_model(model_type, **sizes)
    with pytest.raises(ModelError):
        architecture.check_shape(shape)


def test_a_long_rope_ties_hidden_size_and_heads():
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96,
             "num_hidden_layers": 4, "num_attention_heads": 4, "model_type": "phi3"}  # fmt: skip
    phi3 = architecture_of("phi3")
    phi3.check_shape(replace(shape_from_config(sizes), hidden=32))
    factors = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    shape = shape_from_config(sizes | {"rope_scaling": factors})
    phi3.check_shape(replace(shape, hidden=32, heads=2))
    with pytest.raises(ModelError, match="hidden size 32 is not 4 heads of 16"):
        phi3.check_shape(replace(shape, hidden=32))


FULL, SLIDING = {"rope_type": "linear", "factor": 8.0}, {"rope_type": "default"}
LONG = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}
SPELLINGS = {
    "gemma3_text": (
        {"rope_theta": 5e3, "rope_local_base_freq": 5e2, "rope_scaling": FULL},
        {
            "rope_parameters": {
                "full_attention": {**FULL, "rope_theta": 5e3},
                "sliding_attention": {**SLIDING, "rope_theta": 5e2},
            }
        },
    ),
    "gpt_neox": (
        {"rotary_pct": 0.5, "rotary_emb_base": 5e3},
        {"rope_parameters": {"rope_theta": 5e3, "partial_rotary_factor": 0.5}},
    ),
    "phi3": (
        {
            "partial_rotary_factor": 0.75,
            "rope_scaling": {"type": "longrope", **LONG},
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 5e3, **LONG},
        },
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 5e3,
                "partial_rotary_factor": 0.75,
                **LONG,
            }
        },
    ),
    "qwen3_moe": ({"num_experts": 6}, {"num_local_experts": 6}),
}
"""Settings as 4.57 and as 5 write them; of the former what ``checkpoints`` adds is there too."""


@pytest.mark.parametrize("model_type", SPELLINGS)
def test_either_spelling_becomes_both(model_type):
    old, new = SPELLINGS[model_type]
    architecture = architecture_of(model_type)
    for config in (old, new):
        portable = architecture.portable(config)
        expected = old if model_type == "phi3" else {**old, **new}
        for name in expected.keys() - {"rope_parameters"}:
            assert portable[name] == expected[name]
        assert architecture.portable(portable) == portable
    assert architecture.portable(new).get("rope_parameters") == new.get("rope_parameters")


def test_kept_layers_are_renumbered_and_their_kinds_of_attention_kept(families):
    changes = {"num_hidden_layers": 6, "max_window_layers": 3}
    model = families.tiny("qwen3", **changes)
    architecture_of("qwen3").keep_layers(model, [0, 2, 4, 5])
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]
    assert model.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert model.config.max_window_layers == 2
    assert model.config.num_hidden_layers == 4


def test_layers_without_positions_and_dense_layers_are_kept_by_the_layer(families):
    smollm = families.tiny("smollm3")
    architecture_of("smollm3").keep_layers(smollm, [1, 2])
    assert smollm.config.no_rope_layers == [0, 1]
    moe = families.tiny("qwen3_moe", num_hidden_layers=6, decoder_sparse_step=2)
    architecture_of("qwen3_moe").keep_layers(moe, [1, 3, 4, 5])
    assert moe.config.mlp_only_layers == [0, 2]
    assert shape_from_config(moe.config.to_dict()).dense_layers == 2
