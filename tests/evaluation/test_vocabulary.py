"""Two tokenizers are the same if they mean the same, not if their files are."""

import json
import shutil

import pytest

from trt_kd.errors import ModelError
from trt_kd.evaluation.vocabulary import check_same_tokenizer, context_tokens, tokenizer_identity


@pytest.fixture
def rewrite(tokenizer_dir, tmp_path):
    def write(change):
        content = json.loads((tokenizer_dir / "tokenizer.json").read_text())
        change(content)
        (tmp_path / "tokenizer.json").write_text(json.dumps(content, indent=1))
        return tmp_path

    return write


def spell_merges_the_other_way(content):
    merges = content["model"]["merges"]
    content["model"]["merges"] = [
        m.split(" ") if isinstance(m, str) else " ".join(m) for m in merges
    ]


def set_padding(content):
    content["padding"] = {"strategy": "BatchLongest", "pad_id": 0}


def drop_defaults(content):
    content["model"] = {k: v for k, v in content["model"].items() if v not in (None, False, "")}


@pytest.mark.parametrize("change", [spell_merges_the_other_way, set_padding, drop_defaults])
def test_a_rewritten_tokenizer_is_the_same(change, rewrite, tokenizer_dir):
    check_same_tokenizer(rewrite(change), tokenizer_dir)


def test_a_file_saved_through_transformers_is_the_same(tokenizer_dir, tmp_path):
    from trt_kd.checkpoints import load_tokenizer

    load_tokenizer(tokenizer_dir).save_pretrained(tmp_path)
    check_same_tokenizer(tmp_path, tokenizer_dir)


def test_another_vocabulary_is_refused_in_two_lines(rewrite, tokenizer_dir):
    other = rewrite(lambda content: content["model"]["vocab"].update({"new": 512}))
    with pytest.raises(ModelError, match="different tokenizers") as error:
        check_same_tokenizer(other, tokenizer_dir)
    assert len(str(error.value).splitlines()) == 2


def test_an_absent_or_damaged_tokenizer_is_named(tmp_path):
    with pytest.raises(ModelError, match="cannot be read"):
        tokenizer_identity(tmp_path)
    for text in ("{", "[]", '{"model": 3}', "{}"):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ModelError, match=r"tokenizer\.json (is not|does not hold)"):
            tokenizer_identity(tmp_path)


def test_the_longest_context_comes_from_the_configuration(teacher, tmp_path):
    assert context_tokens(teacher.path) == 512
    shutil.copy(teacher.path / "config.json", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert context_tokens(tmp_path) == 2048
