"""Laws of every data source, and what each one reads."""

import json
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from trt_kd.artifacts import writing
from trt_kd.checkpoints import load_tokenizer
from trt_kd.config import StageConfig
from trt_kd.data import DATA
from trt_kd.data.base import DataConfig, documents, shuffled, token_blocks
from trt_kd.data.generated import TEXTS as TEXTS_FILE
from trt_kd.data.generated import GeneratedText
from trt_kd.data.hub import HubDataset
from trt_kd.data.jsonl import JsonLines
from trt_kd.data.source import DataSource
from trt_kd.data.text import TextFiles
from trt_kd.errors import ArtifactError, DataError, MissingDependencyError

TEXTS = ["First document, two\nlines.", "Second document.", "Third: ünïcode ✓."]


def write_text(folder, texts=TEXTS):
    (folder / "a.txt").write_text("\n\n".join(texts), encoding="utf-8")
    return TextFiles(files=[str(folder / "*.txt")])


def write_jsonl(folder, texts=TEXTS):
    lines = [json.dumps({"body": text, "id": n}) for n, text in enumerate(texts)]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return JsonLines(files=[str(folder / "a.jsonl")], field="body")


def write_folder(folder, texts=TEXTS):
    (folder / "set").mkdir(exist_ok=True)
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "set" / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return HubDataset(name=str(folder / "set"))


class WrittenConfig(StageConfig):
    """Stands for the stage that lets a teacher write."""

    stage = "generate"


def write_generated(folder, texts=TEXTS):
    shutil.rmtree(folder / "written", ignore_errors=True)
    with writing(folder / "written", kind="text", config=WrittenConfig(), inputs={}) as draft:
        lines = [json.dumps({"prompt": text[:3], "text": text}) for text in texts]
        (draft.path / TEXTS_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return GeneratedText(artifact=str(folder / "written"))


WRITERS = {
    "text": write_text,
    "jsonl": write_jsonl,
    "generated": write_generated,
    "hf_dataset": write_folder,
}


@pytest.fixture(params=WRITERS)
def write(request, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return WRITERS[request.param]


@pytest.mark.parametrize("name", DATA.names())
def test_a_source_is_registered_under_its_kind(name):
    member = DATA.load(name)
    assert issubclass(member, DataSource)
    assert member.model_fields["kind"].default == name
    assert DATA.summary(name)


def test_a_source_without_traces_or_fields_knows_none(write, tmp_path):
    source = write(tmp_path)
    assert source.traced() == {}  # what was generated here thinks nothing
    if not source.holds_fields:
        assert source.beside("id") == {}


def test_what_stands_beside_a_document_is_told_by_the_document(tmp_path):
    assert write_jsonl(tmp_path).beside("id") == dict(zip(TEXTS, "012", strict=True))
    with pytest.raises(DataError, match="in field 'other'"):
        write_jsonl(tmp_path).beside("other")


def test_documents_come_back_in_order(write, tmp_path):
    assert list(write(tmp_path).documents()) == TEXTS


def test_the_fingerprint_follows_the_content_and_nothing_else(write, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    first, second = write(tmp_path / "one"), write(tmp_path / "two")
    assert first.fingerprint() == second.fingerprint() == first.fingerprint()
    assert write(tmp_path / "two", [*TEXTS[:2], "Third!"]).fingerprint() != first.fingerprint()


def test_docstrings_are_many_long_different_and_repeatable():
    source = DataConfig().source
    texts = source.documents()
    assert len(texts) == len(set(texts)) > 1000
    assert min(map(len, texts)) > 120
    assert texts == source.documents()
    assert source.fingerprint() == source.fingerprint()
    assert any("namedtuple" in text for text in texts)


def test_fingerprints_need_no_torch(text_file):
    code = (
        "import sys; from trt_kd.data.base import DataConfig;"
        "DataConfig().outside();"
        "DataConfig(source={'kind': 'hf_dataset', 'name': 'a/b'}).outside();"
        f"DataConfig(source={{'kind': 'text', 'files': [{str(text_file)!r}]}}).outside();"
        "sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_pattern_without_files_is_named(tmp_path):
    with pytest.raises(DataError, match="names no file"):
        TextFiles(files=[str(tmp_path / "*.txt")]).fingerprint()


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        TextFiles(files=[str(tmp_path / "latin.txt")]).documents()


def test_a_folder_that_holds_no_generated_text_is_named(tmp_path, teacher):
    with pytest.raises(ArtifactError, match=r"holds no trt_kd\.json"):
        GeneratedText(artifact=str(tmp_path)).fingerprint()
    with pytest.raises(ArtifactError, match="holds a checkpoint, not a text"):
        GeneratedText(artifact=str(teacher.path)).documents()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{broken", "line 2 is not valid JSON"),
        ('{"text": "x"}', "no text in field 'body'; it holds text"),
        ('{"body": 3}', "no text in field 'body'"),
        ("[1]", "it holds list"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, problem):
    (tmp_path / "a.jsonl").write_text(f'{{"body": "fine"}}\n{line}\n')
    with pytest.raises(DataError, match=problem):
        JsonLines(files=[str(tmp_path / "a.jsonl")], field="body").documents()


def test_a_hub_data_set_is_known_by_its_name_and_revision():
    assert HubDataset(name="a/b", revision="v1").fingerprint() == "a/b@v1"
    assert HubDataset(name="a/b").fingerprint() == "a/b@latest"


def test_an_unreachable_data_set_is_a_two_line_error(monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match="'a/b' cannot be loaded: Couldn't reach the hub") as error:
        HubDataset(name="a/b").documents()
    assert len(str(error.value).splitlines()) == 2


def test_a_wrong_column_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = write_folder(tmp_path).model_copy(update={"field": "body"})
    with pytest.raises(DataError, match="no column 'body'; it has text"):
        source.documents()


def test_a_column_that_is_partly_no_text_loses_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = write_folder(tmp_path, [TEXTS[0], None, "  ", *TEXTS[1:], TEXTS[0]])
    config = DataConfig(source=source, heldout_share=1e-9)
    assert list(documents(config, "train")) == TEXTS


def test_a_data_set_gives_the_same_blocks_as_its_texts_and_stays_on_disk(
    tmp_path, monkeypatch, tokenizer_dir
):
    """Ten megabytes of text, of which a third may be in memory at a time."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = [f"Number {n}. " + f"line {n * n} " * 400 for n in range(2000)]
    lazy = DataConfig(source=write_folder(tmp_path, texts), block_tokens=64)
    whole = DataConfig(source=write_jsonl(tmp_path, texts), block_tokens=64)
    tokenizer = load_tokenizer(tokenizer_dir)
    lazy.source.documents()  # imports, and the cache of the data set
    tracemalloc.start()
    order = shuffled(documents(lazy, "train"), seed=3)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert list(order[:3]) == shuffled(documents(whole, "train"), seed=3)[:3]
    assert 3 * peak_bytes < sum(map(len, texts))
    found, expected = (
        token_blocks(data, tokenizer, split="train", count=4, offset=2, seed=3)
        for data in (lazy, whole)
    )
    np.testing.assert_array_equal(found, expected)


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"trt-kd\[compress\]"):
        HubDataset(name="a/b").documents()
