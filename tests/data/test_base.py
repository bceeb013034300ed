"""Splits never meet, packing is exact, and everything repeats."""

import hashlib

import numpy as np
import pytest

from trt_kd.checkpoints import load_tokenizer
from trt_kd.data.base import (
    DataConfig,
    documents,
    fingerprint,
    token_blocks,
    tokenizer_digest,
)
from trt_kd.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return load_tokenizer(tokenizer_dir)


@pytest.fixture
def config(text_file):
    source = {"kind": "text", "files": [str(text_file)]}
    return DataConfig.model_validate({"source": source, "block_tokens": 32, "heldout_share": 0.25})


def test_the_splits_are_disjoint_and_cover_the_source(config):
    train, heldout = documents(config, "train"), documents(config, "heldout")
    assert not set(train) & set(heldout)
    assert sorted(train + heldout) == sorted(config.source.documents())
    assert 0.15 < len(heldout) / 400 < 0.35


def test_a_document_keeps_its_split_when_text_is_added(config, text_file, tmp_path):
    more = tmp_path / "more.txt"
    more.write_text("Something new.\n\nAnd more.\n\n" + text_file.read_text())
    grown = config.model_copy(
        update={"source": config.source.model_copy(update={"files": [str(more)]})}
    )
    assert set(documents(config, "heldout")) <= set(documents(grown, "heldout"))


def test_a_repeated_document_counts_once_however_it_is_wrapped(config, text_file, tmp_path):
    twice = tmp_path / "twice.txt"
    text = text_file.read_text()
    twice.write_text(text + "\n\n" + text.replace(", ", ",\n"))
    source = config.source.model_copy(update={"files": [str(twice)]})
    doubled = config.model_copy(update={"source": source})
    assert documents(doubled, "train") == documents(config, "train")


def test_packing_loses_and_invents_no_token(config, tokenizer):
    end = tokenizer.eos_token_id
    texts = documents(config, "train")
    ids = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts}
    order = sorted(
        texts, key=lambda t: hashlib.sha256(f"7\n{' '.join(t.split())}".encode()).digest()
    )
    stream = [token for text in order for token in [*ids[text], end]]

    blocks = token_blocks(config, tokenizer, split="train", count=40, offset=3, seed=7)

    assert blocks.dtype == np.int64
    np.testing.assert_array_equal(blocks.ravel(), stream[3 * 32 : 43 * 32])


def test_the_same_seed_gives_the_same_blocks_and_another_seed_others(config, tokenizer):
    first, again = (token_blocks(config, tokenizer, split="train", count=8) for _ in range(2))
    other = token_blocks(config, tokenizer, split="train", count=8, seed=1)
    np.testing.assert_array_equal(first, again)
    assert fingerprint(first) == fingerprint(again) != fingerprint(other)


def test_ranges_of_the_stream_join_without_a_seam(config, tokenizer):
    whole = token_blocks(config, tokenizer, split="train", count=10)
    tail = token_blocks(config, tokenizer, split="train", count=6, offset=4)
    np.testing.assert_array_equal(whole[4:], tail)


def test_blocks_are_the_callers_own(config, tokenizer):
    blocks = token_blocks(config, tokenizer, split="train", count=2)
    before = blocks.copy()
    blocks[:] = 0
    np.testing.assert_array_equal(token_blocks(config, tokenizer, split="train", count=2), before)


def test_too_little_text_says_how_much_there_is_and_what_to_do(config, tokenizer):
    with pytest.raises(DataError, match=r"holds \d+ blocks of 32 tokens, not 100000 blocks") as e:
        token_blocks(config, tokenizer, split="heldout", count=100_000)
    assert "heldout_share" in e.value.hint
    assert "\n" not in str(e.value.args[0])


def test_a_negative_count_is_the_callers_mistake(config, tokenizer):
    with pytest.raises(ValueError, match="negative"):
        token_blocks(config, tokenizer, split="train", count=-1)


def test_an_empty_split_is_an_error(tmp_path):
    (tmp_path / "one.txt").write_text("Only one document.")
    config = DataConfig.model_validate(
        {"source": {"kind": "text", "files": [str(tmp_path / "one.txt")]}, "heldout_share": 1e-9}
    )
    with pytest.raises(DataError, match="no document in the heldout split"):
        documents(config, "heldout")


def test_a_tokenizer_without_an_end_is_an_error(config, tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="end-of-text"):
        token_blocks(config, tokenizer, split="train", count=1)


def test_the_tokenizer_digest_sees_the_vocabulary(tokenizer, tokenizer_dir):
    same, other = load_tokenizer(tokenizer_dir), load_tokenizer(tokenizer_dir)
    other.add_tokens(["<|new|>"])
    assert tokenizer_digest(same) == tokenizer_digest(tokenizer) != tokenizer_digest(other)


def test_the_settings_round_trip_with_the_options_of_the_source(config):
    dumped = config.model_dump(mode="json")
    assert dumped["source"]["kind"] == "text"
    assert DataConfig.model_validate(dumped) == config
    assert DataConfig.model_validate({"source": "stdlib_docstrings"}) == DataConfig()
