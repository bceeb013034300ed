"""Common boundaries of two tokenizers, against prefixes that are decoded and compared."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from trt_kd.errors import ModelError
from trt_kd.teachers.spans import Translator, token_bytes

PLAIN = "Open the file, read every line, strip the newline and count the words."
FOREIGN = "Grüße aus Köln: 東京 costs 5 € or 🙂, naïve?"


def saved(tokenizer, directory, **settings):
    tokenizer.save(str(directory / "tokenizer.json"))
    whole = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", **settings}
    (directory / "tokenizer_config.json").write_text(json.dumps(whole), encoding="utf-8")
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def student(tokenizer_dir):
    return AutoTokenizer.from_pretrained(tokenizer_dir)


def byte_level(text_file, directory):
    """Another byte-level vocabulary, of fewer and other merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(text_file)], trainer)
    return saved(tokenizer, directory)


def sentence_piece(text_file, directory):
    """A vocabulary as SentencePiece writes it: a mark for spaces, bytes as a last resort."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train([str(text_file)], trainer)
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    content["model"]["byte_fallback"] = True
    content["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ],
    }
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    made = Tokenizer.from_str(json.dumps(content))
    return saved(made, directory, bos_token="<s>", unk_token="<unk>")


@pytest.fixture(scope="module", params=[byte_level, sentence_piece], ids=lambda f: f.__name__)
def teacher(request, text_file, tmp_path_factory):
    return request.param(text_file, tmp_path_factory.mktemp("teacher"))


def spelled(tokenizer, ids):
    table = token_bytes(tokenizer)
    return b"".join(table[token] for token in ids)


def without_start(tokenizer, ids):
    return ids[1:] if ids[0] == tokenizer.bos_token_id else ids


@pytest.mark.parametrize("text", [PLAIN, FOREIGN, "a", " leading  and  trailing "])
def test_tokens_spell_the_text_they_were_made_of(student, teacher, text):
    for tokenizer in (student, teacher):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert spelled(tokenizer, ids).removeprefix(b" ") == text.encode().removeprefix(b" ")


@pytest.mark.parametrize("text", [PLAIN, FOREIGN])
def test_pairs_are_all_places_at_which_both_prefixes_spell_the_same(student, teacher, text):
    tokens = student(text, add_special_tokens=False)["input_ids"]
    found = Translator(student, teacher).read(tokens)
    ids = teacher(text)["input_ids"]
    assert found.ids == ids
    ours = [spelled(student, tokens[: n + 1]) for n in range(len(tokens))]
    theirs = [
        spelled(teacher, without_start(teacher, ids[: n + 1])).removeprefix(b" ")
        for n in range(len(ids))
    ]
    wanted = [
        (here, there)
        for here, one in enumerate(ours)
        for there, other in enumerate(theirs)
        if one == other and other
    ]
    assert found.pairs == wanted
    assert len(wanted) > 5
    assert wanted[-1] == (len(tokens) - 1, len(ids) - 1)


def test_texts_of_a_block_are_read_one_by_one_and_end_together(student, teacher):
    parts = [student(text, add_special_tokens=False)["input_ids"] for text in (PLAIN, FOREIGN)]
    end = student.eos_token_id
    found = Translator(student, teacher).read([*parts[0], end, *parts[1], end])
    alone = [without_start(teacher, Translator(student, teacher).read(part).ids) for part in parts]
    assert without_start(teacher, found.ids) == [
        *alone[0],
        teacher.eos_token_id,
        *alone[1],
        teacher.eos_token_id,
    ]
    first = len(parts[0])
    ended = found.ids.index(teacher.eos_token_id)
    place = dict(found.pairs)[first]  # a mark that only begins a text may follow
    assert spelled(teacher, found.ids[ended + 1 : place + 1]) in (b"", b" ")


def test_a_block_that_cuts_characters_is_read_without_the_pieces(student, teacher):
    tokens = student("x" + FOREIGN[FOREIGN.index("東") :], add_special_tokens=False)["input_ids"]
    table = token_bytes(student)
    cut = next(n for n, t in enumerate(tokens) if table[t][0] & 0xC0 == 0x80)
    found = Translator(student, teacher).read(tokens[cut:])
    rest = spelled(student, tokens[cut:])
    skipped = sum(byte & 0xC0 == 0x80 for byte in rest[:2])
    read = spelled(teacher, without_start(teacher, found.ids)).removeprefix(b" ")
    assert read == rest[skipped:]
    assert len(found.pairs) > 5
    for here, there in found.pairs:
        ours = spelled(student, tokens[cut : cut + here + 1])
        theirs = spelled(teacher, without_start(teacher, found.ids[: there + 1]))
        assert ours[skipped:] == theirs.removeprefix(b" ")
    ends = Translator(student, teacher).read(tokens[:cut])
    assert "�" not in teacher.decode(ends.ids)


def test_a_tokenizer_that_changes_the_text_has_no_boundary_in_it(student, text_file, tmp_path):
    from tokenizers import normalizers

    plain = Tokenizer.from_str(byte_level(text_file, tmp_path).backend_tokenizer.to_str())
    plain.normalizer = normalizers.Lowercase()
    lower = saved(plain, tmp_path)
    parts = [student(t, add_special_tokens=False)["input_ids"] for t in ("Big Words", "all small")]
    found = Translator(student, lower).read([*parts[0], student.eos_token_id, *parts[1]])
    first = len(parts[0])
    assert [here for here, _ in found.pairs if here < first] == []
    assert any(here > first for here, _ in found.pairs)


def test_a_tokenizer_without_an_end_of_text_is_refused(student, text_file, tmp_path):
    other = byte_level(text_file, tmp_path)
    other.eos_token = None
    with pytest.raises(ModelError, match="the teacher's tokenizer has no token that ends a text"):
        Translator(student, other)
