"""The prune stage, from artifact to artifact."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from trt_kd.architectures.shape import read_shape
from trt_kd.artifacts import Artifact, writing
from trt_kd.checkpoints import load_model, load_tokenizer, save_model
from trt_kd.config import StageConfig
from trt_kd.errors import ModelError
from trt_kd.stages.prune import PruneConfig, prune


@pytest.fixture
def settings(text_file):
    data = {"source": {"kind": "text", "files": [str(text_file)]}, "block_tokens": 32}
    return {
        "axes": [{"kind": "ffn", "size": 64}],
        "calibration_tokens": 100,
        "data": data,
    }


def test_the_student_is_a_checkpoint_with_measurements(settings, teacher, tmp_path):
    student = prune(PruneConfig.model_validate(settings), source=teacher, out=tmp_path / "student")
    metrics = student.metrics
    model, loading = AutoModelForCausalLM.from_pretrained(
        student.path, output_loading_info=True, local_files_only=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert metrics["parameters_after"] == model.num_parameters()
    assert metrics["parameters_before"] == read_shape(teacher.path).parameters
    assert metrics["parameters_share"] == pytest.approx(
        metrics["parameters_after"] / metrics["parameters_before"]
    )
    assert metrics["calibration_tokens"] == 128  # whole blocks
    assert len(metrics["block_influence"]) == len(metrics["refits"]) == 4
    assert metrics["importance_pass_s"] > 0
    assert len(metrics["calibration_fingerprint"]) == 64
    assert student.manifest.inputs == {"source": teacher.key}
    student.verify()


def test_the_same_work_gives_the_same_bytes(settings, teacher, tmp_path):
    config = PruneConfig.model_validate(settings)
    first, second = (prune(config, source=teacher, out=tmp_path / name) for name in "ab")
    assert first.manifest.files == second.manifest.files
    assert first.key == second.key


def test_the_source_dtype_is_kept(settings, make_model, tokenizer_dir, tmp_path):
    class Made(StageConfig):
        stage = "import"

    with writing(tmp_path / "half", kind="checkpoint", config=Made(), inputs={}) as draft:
        save_model(make_model().to(torch.bfloat16), draft.path, tokenizer_from=tokenizer_dir)
    source = Artifact.open(tmp_path / "half")
    student = prune(PruneConfig.model_validate(settings), source=source, out=tmp_path / "student")
    assert load_model(student.path).dtype == torch.bfloat16
    assert student.size_bytes < source.size_bytes


def test_a_rehearsal_runs_on_a_twin_of_two_layers(settings, make_model, tokenizer_dir, tmp_path):
    class Made(StageConfig):
        stage = "import"

    with writing(tmp_path / "twin", kind="checkpoint", config=Made(), inputs={}) as draft:
        twin = make_model(num_hidden_layers=2)
        save_model(twin, draft.path, tokenizer_from=tokenizer_dir)
    axes = [{"kind": "ffn", "size": 64}, {"kind": "depth", "drop": [2, 3]}]
    config = PruneConfig.model_validate(settings | {"axes": axes}).rehearsal()
    student = prune(config, source=Artifact.open(tmp_path / "twin"), out=tmp_path / "student")
    shape = read_shape(tmp_path / "twin")
    assert read_shape(student.path) == replace(shape, ffn=64, layers=1)


def test_an_impossible_size_leaves_nothing_behind(settings, teacher, tmp_path):
    config = PruneConfig.model_validate(settings | {"axes": [{"kind": "ffn", "size": 640}]})
    with pytest.raises(ModelError, match="larger than the model"):
        prune(config, source=teacher, out=tmp_path / "student")
    assert list(tmp_path.iterdir()) == []


def test_an_unsupported_architecture_is_named_before_anything_is_loaded(
    settings, teacher, tmp_path
):
    config = json.loads((teacher.path / "config.json").read_text()) | {"model_type": "mamba"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    other = Artifact(tmp_path / "other", teacher.manifest)
    with pytest.raises(ModelError, match="'mamba' is not supported"):
        prune(PruneConfig.model_validate(settings), source=other, out=tmp_path / "student")


def test_the_vocabulary_goes_with_its_tokenizer(settings, teacher, tmp_path):
    """The logits of kept tokens after kept tokens are the old ones, text by text."""
    settings |= {"axes": [{"kind": "vocab", "size": 448}]}
    out = prune(PruneConfig.model_validate(settings), source=teacher, out=tmp_path / "student")
    assert out.metrics["kept_tokens"] == read_shape(out.path).vocab == 448
    old, new = load_tokenizer(teacher.path), load_tokenizer(out.path)
    after = new("The capital of France is Paris.")["input_ids"]
    kept = {new_id: old.convert_tokens_to_ids(token) for token, new_id in new.get_vocab().items()}
    before = [kept[token] for token in after]
    assert old.decode(before) == new.decode(after)
    columns = [kept[token] for token in range(448)]
    with torch.no_grad():
        wide = load_model(teacher.path)(torch.tensor([before])).logits[..., columns]
        narrow = load_model(out.path)(torch.tensor([after])).logits
    torch.testing.assert_close(narrow, wide)


def test_the_vocabulary_and_channels_go_together(settings, teacher, tmp_path):
    settings |= {"axes": [{"kind": "vocab", "size": 448}, {"kind": "ffn", "size": 64}]}
    out = prune(PruneConfig.model_validate(settings), source=teacher, out=tmp_path / "student")
    shape = read_shape(out.path)
    assert (shape.vocab, shape.ffn) == (448, 64)
    assert load_model(out.path).num_parameters() == shape.parameters


def test_an_illegal_size_names_its_neighbours(settings, teacher, tmp_path):
    settings |= {
        "axes": [{"kind": "ffn", "size": 96, "multiple_of": 32}],
        "target": {"format": "int4_awq", "runtime": "trtllm", "gpu": "hopper"},
    }
    with pytest.raises(ModelError, match=r"ffn 96 .*illegal for int4_awq") as caught:
        prune(PruneConfig.model_validate(settings), source=teacher, out=tmp_path / "student")
    assert "128" in caught.value.hint
    assert not (tmp_path / "student").exists()
