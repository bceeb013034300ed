"""Checkpoints load in stock transformers, whichever version wrote them."""

import json

import pytest

from trt_kd.checkpoints import check_weights, load_model, portable_config
from trt_kd.errors import ModelError


def test_a_saved_checkpoint_loads_with_no_missing_or_unexpected_key(teacher):
    model = load_model(teacher.path)
    assert model.config.num_hidden_layers == 4
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_rope_stands_in_both_spellings(teacher):
    config = json.loads((teacher.path / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["head_dim"] == 16


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0},
        {"rope_theta": 100000.0, "rope_type": "default"},
    ],
)
def test_old_and_new_rope_spellings_say_the_same(rope):
    new = portable_config({"rope_parameters": rope})
    old = portable_config({key: new[key] for key in ("rope_theta", "rope_scaling")})
    assert old["rope_parameters"] == rope
    assert (old["rope_theta"], old["rope_scaling"]) == (new["rope_theta"], new["rope_scaling"])


def test_a_truncated_weight_file_is_named_before_anything_is_loaded(teacher, tmp_path):
    whole = (teacher.path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ModelError, match="truncated"):
        check_weights(tmp_path)


def test_an_index_that_points_outside_its_directory_is_refused(tmp_path):
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="points outside"):
        check_weights(tmp_path)


def test_pickled_weights_are_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ModelError, match="no safetensors"):
        check_weights(tmp_path)
