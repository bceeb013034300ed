"""Laws of the vocabulary axis: which tokens stay, and what the cut model says about them."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trt_kd.architectures import architecture_of
from trt_kd.architectures.shape import shape_from_config
from trt_kd.checkpoints import load_model, load_tokenizer, save_model
from trt_kd.config import validate
from trt_kd.errors import ConfigError, DataError, ModelError
from trt_kd.pruning.slicing import cut
from trt_kd.pruning.tokenizer import CutRules, cut_rules, rewrite_tokenizer, verify_tokenizer
from trt_kd.pruning.vocabulary import (
    VocabAxis,
    kept_tokens,
    retention_order,
    used_tokens,
)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return load_tokenizer(tokenizer_dir)


@pytest.fixture(scope="module")
def rules(tokenizer_dir):
    return cut_rules(tokenizer_dir)


@pytest.fixture(scope="module")
def documents(text_file):
    return text_file.read_text(encoding="utf-8").split("\n\n")


@pytest.fixture(scope="module")
def counts(documents, tokenizer):
    """Of two sentences: about a quarter of the tokens is used."""
    return used_tokens(documents[0].split(". ")[1:3], tokenizer)


@pytest.fixture(scope="module")
def least(rules):
    return len(rules.always)


def used_size(counts, rules, min_count=1):
    """The smallest vocabulary with every token that occurs so often."""
    wanted = np.flatnonzero(counts[retention_order(counts, rules)] >= min_count)
    return max(len(rules.always), *(wanted + 1))


def is_closed(tokens, rules):
    return all(set(rules.parts.get(token, ())) <= tokens for token in tokens)


@pytest.fixture(params=[("llama", True), ("llama", False), ("qwen2", True), ("qwen3", False)])
def decoder(request, make_decoder):
    model_type, tied = request.param
    return make_decoder(model_type, tie_word_embeddings=tied)


# --- which tokens stay --------------------------------------------------------------------------


def test_counts_are_those_of_every_text_by_itself(documents, tokenizer):
    expected = Counter(
        token for text in documents for token in tokenizer(text, add_special_tokens=False).input_ids
    )
    counts = used_tokens(iter(documents), tokenizer)
    assert counts.dtype == np.int64
    assert {token: count for token, count in enumerate(counts.tolist()) if count} == expected


def test_rows_beyond_the_tokenizer_count_nothing(documents, tokenizer):
    counts = used_tokens(documents[:3], tokenizer, rows=576)
    assert counts.shape == (576,)
    assert not counts[512:].any()


def test_every_beginning_of_the_order_that_holds_the_minimum_is_closed(counts, rules, least):
    order = retention_order(counts, rules).tolist()
    assert sorted(order) == list(range(len(counts)))
    assert set(order[:least]) == rules.always
    for size in range(least, len(order) + 1, 7):
        assert is_closed(set(order[:size]), rules)


def test_a_token_goes_before_any_more_frequent_one_that_is_no_part_of_others(counts, rules, least):
    order = retention_order(counts, rules).tolist()
    inner = {part for pair in rules.parts.values() for part in pair}
    leaves = [counts[token] for token in order[least:] if token not in inner]
    assert leaves == sorted(leaves, reverse=True)


def test_every_size_is_met_exactly_and_larger_ones_hold_smaller_ones(counts, rules, least):
    before: set[int] = set()
    for size in range(least, len(counts) + 1, 11):
        kept = kept_tokens(counts, rules, size=size).tolist()
        assert kept == sorted(set(kept))
        assert len(kept) == size
        assert before <= set(kept)
        assert rules.always <= set(kept)
        before = set(kept)


@pytest.mark.parametrize("min_count", [1, 2, 3])
def test_what_is_used_stays_with_its_parts_and_nothing_needless(counts, rules, min_count):
    kept = kept_tokens(counts, rules, used_size(counts, rules, min_count))
    assert set(np.flatnonzero(counts >= min_count)) <= set(kept)
    assert is_closed(set(kept.tolist()), rules)
    needless = [token for token in kept if counts[token] < min_count]
    parts = {part for token in kept.tolist() for part in rules.parts.get(token, ())}
    assert set(needless) <= rules.always | parts


def test_rows_without_a_token_come_last(rules):
    used = np.ones(515, dtype=np.int64)
    used[512:] = 0
    assert len(kept_tokens(used, rules, 515)) == 515
    assert retention_order(used, rules)[-3:].tolist() == [512, 513, 514]
    size = used_size(used, rules)
    assert kept_tokens(used, rules, size).tolist() == list(range(512))


def test_long_chains_of_parts_come_in_order():
    chain = {token: (token - 1, 0) for token in range(1, 5000)}
    rules = CutRules(frozenset(range(5000)), frozenset({0}), chain)
    counts = np.zeros(5000, dtype=np.int64)
    counts[4999] = 1
    assert retention_order(counts, rules).tolist() == list(range(5000))


def test_sizes_and_texts_that_cannot_be_are_refused_in_two_lines(counts, rules, least, tokenizer):
    with pytest.raises(ModelError, match=rf"64 cannot hold the {least} .*\n  hint: .* least 320"):
        kept_tokens(counts, rules, size=64)
    with pytest.raises(ModelError, match=r"576 is larger than the model's 512\n  hint: "):
        kept_tokens(counts, rules, size=576)
    with pytest.raises(ModelError, match=r"ids up to 511, the model only 256.*\n  hint: "):
        used_tokens(["a"], tokenizer, rows=256)
    with pytest.raises(ModelError, match=r"token 511 must stay.*\n  hint: "):
        retention_order(counts[:300], rules)
    for texts in ([], ["", ""]):
        with pytest.raises(DataError, match=r"no text.*\n  hint: "):
            used_tokens(texts, tokenizer)


# --- the model ----------------------------------------------------------------------------------


def cut_model(model, kept):
    architecture = architecture_of(model.config.model_type)
    axis = VocabAxis(size=len(kept))
    axis.cut(model, architecture, [torch.as_tensor(kept)])


def test_the_cut_model_says_the_same_of_kept_tokens(decoder, blocks, logits, counts, rules):
    kept = kept_tokens(counts, rules, size=320)
    inputs = blocks[:, :16] % 320  # new ids; the old ones are kept[inputs]
    before = logits(decoder, kept[inputs])
    cut_model(decoder, kept)
    after = logits(decoder, inputs)
    assert after.shape[-1] == 320
    torch.testing.assert_close(after, before[..., kept], rtol=0, atol=1e-6)


def test_rows_are_the_old_ones_bit_by_bit_and_ties_last(decoder, counts, rules):
    kept = kept_tokens(counts, rules, size=320)
    tied = decoder.config.tie_word_embeddings
    embedding, head = decoder.get_input_embeddings(), decoder.get_output_embeddings()
    before = embedding.weight.detach().clone(), head.weight.detach().clone()
    cut_model(decoder, kept)
    assert torch.equal(embedding.weight, before[0][kept])
    assert torch.equal(head.weight, before[1][kept])
    assert (head.weight is embedding.weight) == tied
    assert (embedding.num_embeddings, head.out_features) == (320, 320)
    assert decoder.config.vocab_size == decoder.vocab_size == decoder.model.vocab_size == 320


def test_the_planned_shape_is_the_shape_of_the_cut_model(decoder, counts, rules):
    shape = shape_from_config(decoder.config.to_dict())
    axis = VocabAxis(size=320)
    planned = axis.write(shape, axis.target(shape))
    cut_model(decoder, kept_tokens(counts, rules, size=320))
    assert shape_from_config(decoder.config.to_dict()) == planned
    assert decoder.num_parameters() == planned.parameters


def test_a_bias_and_the_padding_row_follow():
    embedding, head = torch.nn.Embedding(8, 4, padding_idx=5), torch.nn.Linear(4, 8)
    bias = head.bias.detach().clone()
    keep = torch.tensor([1, 3, 5, 6])
    architecture = SimpleNamespace(embedding=lambda model: embedding, head=lambda model: head)
    cut(VocabAxis().places(None, architecture)[0].slices, keep)
    assert torch.equal(head.bias, bias[keep])
    assert embedding.padding_idx == 2
    assert not embedding.weight[2].any()
    cut(VocabAxis().places(None, architecture)[0].slices, torch.tensor([0, 1, 3]))
    assert embedding.padding_idx is None
    assert (embedding.num_embeddings, head.out_features) == (3, 3)


def test_special_ids_of_the_model_follow_their_tokens(make_decoder, counts, rules):
    model = make_decoder(bos_token_id=0, eos_token_id=[300, 0], pad_token_id=300)
    model.generation_config.eos_token_id = [300, 0]
    kept = sorted({*kept_tokens(counts, rules, size=320).tolist(), 300})
    cut_model(model, kept)
    place = kept.index(300)
    assert model.config.eos_token_id == [place, 0]
    assert model.generation_config.eos_token_id == [place, 0]
    assert model.config.bos_token_id == 0
    assert model.config.pad_token_id == place
    assert model.get_input_embeddings().padding_idx == place
    assert model.model.padding_idx == place


def test_a_cut_checkpoint_is_stock(decoder, tokenizer_dir, documents, rules, tmp_path, logits):
    source, out, texts = tmp_path / "source", tmp_path / "out", documents[:5]
    save_model(decoder, source, tokenizer_from=tokenizer_dir)
    tokenizer = load_tokenizer(source)
    counts = used_tokens(texts, tokenizer, rows=512)
    kept = kept_tokens(counts, rules, used_size(counts, rules))
    tokens = torch.tensor([tokenizer(texts[0]).input_ids])
    before = logits(decoder, tokens.numpy())[..., kept]

    cut_model(decoder, kept)
    save_model(decoder, out, tokenizer_from=source)
    rewrite_tokenizer(source, out, kept.tolist())
    verify_tokenizer(source, out, kept.tolist(), documents)

    model, again = load_model(out), load_tokenizer(out)
    tied = model.config.tie_word_embeddings
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert len(again) == model.config.vocab_size == len(kept)
    assert again.eos_token_id == model.config.eos_token_id == 0
    inputs = again(texts[0], return_tensors="pt")["input_ids"]
    torch.testing.assert_close(logits(model, inputs.numpy()), before, rtol=0, atol=1e-6)
    grown = model.generate(
        input_ids=inputs[:, :4],
        attention_mask=torch.ones_like(inputs[:, :4]),
        max_new_tokens=3,
        min_new_tokens=3,
        pad_token_id=0,
    )
    assert grown.shape == (1, 7)
    assert int(grown.max()) < len(kept)


# --- the axis -----------------------------------------------------------------------------------


def test_the_axis_plans_without_weights(make_decoder):
    shape = shape_from_config(make_decoder().config.to_dict())
    axis = VocabAxis(size=320)
    assert axis.target(shape) == 320
    assert axis.legal(shape) == [64, 128, 192, 256, 320, 384, 448, 512]
    assert axis.resized(384).target(shape) == 384
    assert VocabAxis().is_open
    assert VocabAxis().target(shape) == 512
    assert axis.write(shape, 320).parameters == shape.parameters - 192 * shape.hidden


def test_the_axis_keeps_the_best_scores(counts, rules, make_decoder):
    shape = shape_from_config(make_decoder().config.to_dict())
    scores = torch.zeros(512, dtype=torch.float64)
    scores[retention_order(counts, rules)] = torch.arange(512.0, 0.0, -1.0, dtype=torch.float64)
    (kept,) = VocabAxis(size=320).keep([scores], shape)
    assert kept.tolist() == kept_tokens(counts, rules, 320).tolist()


def test_settings_out_of_range_are_named():
    with pytest.raises(ConfigError, match=r"size: .*\n.*multiple_of: "):
        validate(VocabAxis, {"size": 0, "multiple_of": 0}, where="axis")
