import pytest
import torch

from trt_kd.artifacts import Artifact, writing
from trt_kd.checkpoints import load_model, save_model
from trt_kd.config import StageConfig
from trt_kd.teachers.online import OnlineTeacher

TOKENS = torch.arange(24).reshape(2, 12)


class MadeConfig(StageConfig):
    """Stands for whatever stage made the teacher."""

    stage = "import"


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def stored(request, tmp_path, make_model, tokenizer_dir):
    """A checkpoint in each dtype, with a head of its own."""
    model = make_model(tie_word_embeddings=False).to(getattr(torch, request.param))
    with writing(tmp_path / "t", kind="checkpoint", config=MadeConfig(), inputs={}) as draft:
        save_model(model, draft.path, tokenizer_from=tokenizer_dir)
    return Artifact.open(tmp_path / "t").path


def autocast(model):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return model(TOKENS).logits


def test_the_bf16_teacher_is_bit_for_bit_autocast_over_float32_weights(stored):
    loaded = OnlineTeacher().load(stored, precision="bf16")
    assert torch.equal(autocast(loaded), autocast(load_model(stored, dtype="float32")))
    assert loaded.lm_head.weight.dtype == torch.bfloat16


def test_a_tied_embedding_stays_tied_and_float32(teacher):
    loaded = OnlineTeacher().load(teacher.path, precision="bf16")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert loaded.lm_head.weight.dtype == torch.float32
    assert torch.equal(autocast(loaded), autocast(load_model(teacher.path, dtype="float32")))


def test_the_fp32_teacher_is_float32_throughout(stored):
    loaded = OnlineTeacher().load(stored, precision="fp32")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_the_teacher_is_frozen(teacher):
    loaded = OnlineTeacher().load(teacher.path, precision="bf16")
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
