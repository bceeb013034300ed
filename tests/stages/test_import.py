"""Models come in whole, checked and stock, or not at all."""

import json
import shutil

import pytest

from trt_kd.checkpoints import load_model
from trt_kd.errors import ModelError
from trt_kd.stages.import_model import ImportConfig, fingerprint, import_model


def imported(source, out, **changes):
    return import_model(ImportConfig(source=str(source), **changes), out=out)


def test_a_directory_is_imported_with_the_same_logits(teacher, tmp_path):
    import torch

    artifact = imported(teacher.path, tmp_path / "out")

    tokens = torch.arange(32)[None]
    before, after = load_model(teacher.path), load_model(artifact.path)
    torch.testing.assert_close(after(tokens).logits, before(tokens).logits, rtol=0, atol=0)
    assert artifact.metrics["parameters"] == before.num_parameters()


def test_a_twin_keeps_the_first_layers_only(teacher, tmp_path):
    artifact = imported(teacher.path, tmp_path / "out", keep_layers=2)
    assert load_model(artifact.path).config.num_hidden_layers == 2


def test_the_weights_can_change_their_type_on_the_way_in(teacher, tmp_path):
    import torch

    artifact = imported(teacher.path, tmp_path / "out", dtype="bfloat16")
    assert load_model(artifact.path).dtype == torch.bfloat16


def test_other_sizes_than_expected_are_an_error_that_names_them(teacher, tmp_path):
    sizes = {
        "model_type": "llama", "layers": 5, "hidden": 64, "ffn": 128, "heads": 4,
        "kv_heads": 2, "head_dim": 16, "vocab": 512, "tied": True,
    }  # fmt: skip
    with pytest.raises(ModelError, match="layers 4 instead of 5"):
        imported(teacher.path, tmp_path / "out", expect=sizes)
    assert not list(tmp_path.iterdir())


def truncate(source):
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def change_config(source, **changes):
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "truncated"),
        (lambda s: change_config(s, model_type="mamba"), "mamba"),
        (lambda s: change_config(s, auto_map={"AutoModel": "x.Y"}), "auto_map"),
        (lambda s: (s / "config.json").write_text("{"), "not valid JSON"),
        (lambda s: (s / "config.json").unlink(), "cannot be read"),
        (lambda s: (s / "model.safetensors").unlink(), "no safetensors"),
    ],
)
def test_a_damaged_or_unknown_model_is_refused_and_leaves_nothing(
    teacher, tmp_path, damage, message
):
    source = tmp_path / "source"
    shutil.copytree(teacher.path, source)
    damage(source)
    with pytest.raises(ModelError, match=message) as caught:
        imported(source, tmp_path / "out")
    assert len(str(caught.value).splitlines()) <= 2
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_missing_source_says_what_can_be_named(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        imported(tmp_path / "nowhere", tmp_path / "out")


def test_an_absent_package_is_named(tmp_path):
    with pytest.raises(ModelError, match="package no_such_package is not installed"):
        imported("package:no_such_package/model.gguf", tmp_path / "out")


def test_the_fingerprint_follows_the_bytes_and_not_the_place(teacher, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(teacher.path, copy)
    assert fingerprint(copy) == fingerprint(teacher.path)
    whole = bytearray((copy / "model.safetensors").read_bytes())
    whole[-1] ^= 1
    (copy / "model.safetensors").write_bytes(whole)
    assert fingerprint(copy) != fingerprint(teacher.path)
