"""Caches on disk: complete or not there, resumed to the same bytes, never of another teacher."""

import json
import shutil
from collections import namedtuple
from functools import partial

import numpy as np
import pytest
import torch

from trt_kd.checkpoints import load_model, save_model
from trt_kd.errors import ArtifactError, ModelError, TrtKdError
from trt_kd.losses.top_k import top_k_of
from trt_kd.teachers import writing as writing_module
from trt_kd.teachers.cache import INDEX, Cache
from trt_kd.teachers.forward import top_k_rows
from trt_kd.teachers.identity import identity_of
from trt_kd.teachers.online import OnlineTeacher
from trt_kd.teachers.shards import Contents
from trt_kd.teachers.writing import estimate_bytes, write_cache

COUNT, LENGTH, K = 14, 12, 8


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Two batches of two blocks to a shard."""
    monkeypatch.setattr(writing_module, "SHARD_TOKENS", 4 * LENGTH)


@pytest.fixture(scope="module")
def blocks():
    return np.random.default_rng(0).integers(0, 512, (COUNT, LENGTH))


@pytest.fixture(scope="module")
def identity(teacher):
    return identity_of(teacher.path, precision="fp32")


@pytest.fixture
def fill(teacher, identity):
    """Fill a cache with the tiny teacher; keyword arguments replace the settings."""

    def write(directory, blocks, **changes):
        load = partial(OnlineTeacher().load, teacher.path, precision="fp32")
        given = {"k": K, "identity": identity} | changes
        load = given.pop("load", load)
        return write_cache(directory, load, blocks, contents=Contents(**given), batch_size=2)

    return write


@pytest.fixture
def filled(fill, blocks, tmp_path):
    return fill(tmp_path / "cache", blocks)


def never():
    raise RuntimeError("the teacher was loaded")


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix}


def shards_of(directory):
    return sorted(directory.glob("shard-*.safetensors"))


class Kill(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def kill_at(monkeypatch):
    """End the writing when the forward pass of that number begins."""

    def arm(number):
        calls = iter(range(10**6))

        def rows(*args, **kwargs):
            if next(calls) == number:
                raise Kill
            return top_k_rows(*args, **kwargs)

        monkeypatch.setattr("trt_kd.teachers.forward.top_k_rows", rows)

    return arm


def two_lines(error):
    assert isinstance(error.value, TrtKdError)
    assert len(str(error.value).splitlines()) == 2
    return str(error.value)


# --- what it says -------------------------------------------------------------------------------


def test_rows_are_the_teachers_top_k_and_tail(filled, teacher, blocks):
    with torch.no_grad():
        logits = load_model(teacher.path)(torch.from_numpy(blocks)).logits[:, :-1].flatten(0, 1)
    true, top = top_k_of(logits, K), filled.rows(blocks)
    assert len(top) == COUNT * (LENGTH - 1)
    order = true.ids.argsort(-1)
    assert torch.equal(top.ids, true.ids.gather(-1, order))
    torch.testing.assert_close(top.logp, true.logp.gather(-1, order), atol=0.15, rtol=0)
    torch.testing.assert_close(top.tail, true.tail, atol=0.15, rtol=0)
    assert (top.ids.dtype, top.logp.dtype, top.tail.dtype) == (
        torch.int64,
        torch.float32,
        torch.float32,
    )


def test_the_bf16_cache_holds_what_an_online_bf16_teacher_says(teacher, blocks):
    model = OnlineTeacher().load(teacher.path, precision="bf16")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.from_numpy(blocks), use_cache=False).logits[:, :-1]
    for (kept, _), dense in zip(
        top_k_rows(model, blocks, k=K, precision="bf16"), logits, strict=True
    ):
        expected = top_k_of(dense, K)
        torch.testing.assert_close(torch.from_numpy(kept.logp), expected.logp, atol=1e-6, rtol=0)
        torch.testing.assert_close(torch.from_numpy(kept.tail), expected.tail, atol=1e-5, rtol=0)


def test_draws_are_of_the_tail_as_often_as_the_teacher_says(fill, teacher, blocks, tmp_path):
    cache = fill(tmp_path / "cache", blocks, k=K + 64, draws=64)
    plain, top = fill(tmp_path / "plain", blocks).rows(blocks), cache.rows(blocks)
    for name in ("ids", "logp", "tail"):
        assert torch.equal(getattr(top, name), getattr(plain, name))
    with torch.no_grad():
        logits = load_model(teacher.path)(torch.from_numpy(blocks)).logits[:, :-1].flatten(0, 1)
    inside = logits.double().softmax(-1).scatter(-1, top.ids, 0.0)
    inside /= inside.sum(-1, keepdim=True)
    times = torch.zeros_like(inside).scatter_add_(
        -1, top.inside.drawn, torch.full(top.inside.drawn.shape, 1 / 64, dtype=torch.float64)
    )
    assert not (times * (inside == 0)).any()
    # Evenly apart: up to any token, as many were drawn as the sum says, or one more or less.
    gap = (times.cumsum(-1) - inside.cumsum(-1)).abs().max()
    assert gap <= 1 / 64 + 1e-4
    entropy = torch.special.entr(inside).sum(-1)
    torch.testing.assert_close(top.inside.entropy.double(), entropy, atol=0.02, rtol=0)


def test_draws_follow_from_the_block_and_not_from_where_it_stands(fill, blocks, tmp_path):
    drawn = {"k": K, "draws": 3}
    turned = fill(tmp_path / "turned", blocks[::-1].copy(), **drawn).rows(blocks)
    torch.testing.assert_close(
        fill(tmp_path / "cache", blocks, **drawn).rows(blocks).inside, turned.inside
    )


def test_order_and_batch_size_of_reading_are_free(filled, blocks):
    whole = filled.rows(blocks)
    order = np.random.default_rng(1).permutation(COUNT)
    for place in order:
        one = filled.rows(blocks[place : place + 1])
        rows = slice(place * (LENGTH - 1), (place + 1) * (LENGTH - 1))
        assert torch.equal(one.ids, whole.ids[rows])
        assert torch.equal(one.logp, whole.logp[rows])
        assert torch.equal(one.tail, whole.tail[rows])


def test_a_repeated_block_is_kept_once(fill, blocks, tmp_path):
    twice = fill(tmp_path / "cache", np.concatenate((blocks[:4], blocks[:4])))
    assert twice.samples == 4
    assert len(twice.rows(np.concatenate((blocks[:1], blocks[:1])))) == 2 * (LENGTH - 1)


def test_the_teacher_is_not_loaded_when_all_is_there(filled, fill, blocks):
    before = contents(filled.directory)
    again = fill(filled.directory, blocks[::-1], load=never)
    assert again.samples == COUNT
    assert contents(filled.directory) == before


def test_later_blocks_are_added_and_earlier_ones_stay(fill, blocks, tmp_path):
    first = fill(tmp_path / "cache", blocks[:6])
    before = contents(tmp_path / "cache")
    assert first.holds(blocks).tolist() == [True] * 6 + [False] * (COUNT - 6)
    second = fill(tmp_path / "cache", blocks[3:])
    assert second.holds(blocks).all()
    after = contents(tmp_path / "cache")
    assert {name: after[name] for name in before if name != INDEX} == {
        name: value for name, value in before.items() if name != INDEX
    }
    assert torch.equal(first.rows(blocks[:6]).ids, second.rows(blocks[:6]).ids)


def test_the_index_names_no_folder_and_says_whose_it_is(filled, identity):
    text = (filled.directory / INDEX).read_text(encoding="utf-8")
    index = json.loads(text)
    assert index["contents"] == {
        "schema_version": 1,
        "k": K,
        "draws": 0,
        "identity": identity.model_dump(mode="json"),
    }
    assert str(filled.directory) not in text
    assert sum(shard["samples"] for shard in index["shards"]) == COUNT == filled.samples
    assert filled.size_bytes == sum(path.stat().st_size for path in shards_of(filled.directory))


# --- how it survives ----------------------------------------------------------------------------


@pytest.mark.parametrize("forward", range(7))
def test_a_killed_run_goes_on_to_the_same_bytes(filled, fill, blocks, tmp_path, kill_at, forward):
    place = tmp_path / "killed"
    kill_at(forward)
    with pytest.raises(Kill):
        fill(place, blocks)
    assert len(shards_of(place)) == forward // 2
    with pytest.raises(ArtifactError, match="holds no index"):
        Cache.open(place, expect=filled.index.contents.identity)
    kill_at(-1)
    fill(place, blocks)
    assert contents(place) == contents(filled.directory)


def test_a_kill_while_adding_leaves_what_readers_see(fill, blocks, identity, tmp_path, kill_at):
    fill(tmp_path / "cache", blocks[:4])
    kill_at(3)
    with pytest.raises(Kill):
        fill(tmp_path / "cache", blocks)
    seen = Cache.open(tmp_path / "cache", expect=identity)
    assert seen.holds(blocks).sum() == 4
    assert len(shards_of(tmp_path / "cache")) == 2


def test_a_half_written_shard_is_never_seen(fill, blocks, filled, tmp_path, monkeypatch):
    place = tmp_path / "killed"
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(Kill))
    with pytest.raises(Kill):
        fill(place, blocks)
    assert shards_of(place) == []
    monkeypatch.undo()
    monkeypatch.setattr(writing_module, "SHARD_TOKENS", 4 * LENGTH)
    fill(place, blocks)
    assert contents(place) == contents(filled.directory)


def test_a_full_disk_is_told_first_and_nothing_is_loaded(fill, blocks, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(100, 90, 10))
    with pytest.raises(ArtifactError, match=r"take up to .* GB are free") as error:
        fill(tmp_path / "cache", blocks, load=never)
    two_lines(error)


def test_a_disk_that_fills_up_keeps_the_complete_shards(
    fill, blocks, filled, tmp_path, monkeypatch
):
    place, calls, real = tmp_path / "full", iter(range(100)), writing_module.write_shard

    def write_shard(path, *args):
        if next(calls) == 2:
            with monkeypatch.context() as patch:
                patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
                return real(path, *args)
        return real(path, *args)

    monkeypatch.setattr(writing_module, "write_shard", write_shard)
    with pytest.raises(ArtifactError, match="could not be written: full") as error:
        fill(place, blocks)
    two_lines(error)
    assert len(shards_of(place)) == 2
    assert not list(place.glob("*.partial"))
    fill(place, blocks)
    assert contents(place) == contents(filled.directory)


def test_the_estimate_is_no_less_than_what_is_written(filled, identity):
    assert filled.size_bytes > 0
    large = identity.model_copy(update={"vocabulary": 49_152})
    for draws in (0, 12):
        contents, tokens = Contents(k=50, draws=draws, identity=large), 10**6
        assert 100 * tokens < estimate_bytes(tokens, contents) < 130 * tokens


# --- what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"teacher": "0" * 64}, "another teacher"),
        ({"tokenizer": "0" * 64}, "another tokenizer"),
        ({"vocabulary": 513}, "another vocabulary: 512, not 513"),
        ({"precision": "bf16"}, "another precision: fp32, not bf16"),
    ],
)
def test_another_teacher_is_named_by_readers_and_writers(
    filled, fill, blocks, identity, changes, what
):
    other = identity.model_copy(update=changes)
    with pytest.raises(ModelError, match=what) as error:
        Cache.open(filled.directory, expect=other)
    two_lines(error)
    with pytest.raises(ModelError, match=what):
        fill(filled.directory, blocks, identity=other, load=never)


def test_shards_of_another_teacher_are_refused_without_an_index_too(filled, fill, blocks, identity):
    (filled.directory / INDEX).unlink()
    other = identity.model_copy(update={"teacher": "0" * 64})
    with pytest.raises(ModelError, match="another teacher"):
        fill(filled.directory, blocks, identity=other, load=never)


def test_another_k_is_refused(filled, fill, blocks):
    with pytest.raises(
        ModelError, match="8 tokens of every position, 0 of them drawn, not 9 and 0"
    ) as error:
        fill(filled.directory, blocks, k=9, load=never)
    two_lines(error)


def test_other_draws_are_refused(filled, fill, blocks):
    with pytest.raises(ModelError, match="0 of them drawn, not 8 and 2") as error:
        fill(filled.directory, blocks, draws=2, load=never)
    assert "set k to 8 and draws to 0" in two_lines(error)


def test_more_kept_tokens_than_there_are_is_refused(fill, blocks, tmp_path):
    with pytest.raises(ModelError, match="k 513 is more than the teacher's 512"):
        fill(tmp_path / "cache", blocks, k=513, load=never)


def test_a_missing_block_is_counted(filled, blocks):
    other = (blocks[:3] + 1) % 512
    with pytest.raises(ArtifactError, match="lacks 3 of 3 blocks") as error:
        filled.rows(other)
    two_lines(error)
    with pytest.raises(ArtifactError, match=f"of {LENGTH - 1} tokens"):
        filled.rows(blocks[:1, :-1])


def test_a_truncated_shard_is_named_by_readers_and_writers(filled, fill, blocks, identity):
    path = shards_of(filled.directory)[1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=rf"{path.name} is damaged") as error:
        Cache.open(filled.directory, expect=identity)
    two_lines(error)
    with pytest.raises(ArtifactError, match=rf"{path.name} is damaged"):
        fill(filled.directory, blocks, load=never)


def test_a_removed_shard_is_named_and_written_anew(filled, fill, blocks, identity):
    before = contents(filled.directory)
    shards_of(filled.directory)[1].unlink()
    with pytest.raises(ArtifactError, match="missing") as error:
        Cache.open(filled.directory, expect=identity)
    two_lines(error)
    fill(filled.directory, blocks)
    assert contents(filled.directory) == before


def test_flipped_bits_are_noticed_where_they_are_read(filled, blocks, identity):
    path = shards_of(filled.directory)[0]
    content = bytearray(path.read_bytes())
    content[-20] ^= 255
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{path.name} is damaged: sample 3") as error:
        Cache.open(filled.directory, expect=identity).rows(blocks)
    two_lines(error)


@pytest.mark.parametrize("content", ["", "{}", '{"contents": 1, "shards": []}'])
def test_a_damaged_index_is_named_and_its_removal_mends_it(filled, fill, blocks, identity, content):
    before = contents(filled.directory)
    (filled.directory / INDEX).write_text(content)
    with pytest.raises(ArtifactError, match=r"index\.json is damaged") as error:
        Cache.open(filled.directory, expect=identity)
    two_lines(error)
    (filled.directory / INDEX).unlink()
    fill(filled.directory, blocks, load=never)
    assert contents(filled.directory) == before


def test_a_foreign_file_under_a_shards_name_is_refused(fill, blocks, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "shard-00000.safetensors").write_bytes(b"no shard")
    with pytest.raises(ArtifactError, match="damaged") as error:
        fill(tmp_path / "cache", blocks, load=never)
    two_lines(error)


def test_a_teacher_that_gives_nan_is_refused(teacher, fill, blocks, tmp_path):
    def load():
        model = OnlineTeacher().load(teacher.path, precision="fp32")
        model.get_input_embeddings().weight[:] = torch.nan
        return model

    with pytest.raises(ModelError, match=r"linear head|not finite") as error:
        fill(tmp_path / "cache", blocks, load=load)
    two_lines(error)


def test_a_teacher_that_caps_its_logits_is_refused(teacher, fill, blocks, tmp_path):
    def load():
        model = OnlineTeacher().load(teacher.path, precision="fp32")
        plain = model.forward

        def capped(*args, **kwargs):
            output = plain(*args, **kwargs)
            output.logits = torch.tanh(output.logits)
            return output

        model.forward = capped
        return model

    with pytest.raises(ModelError, match="linear head"):
        fill(tmp_path / "cache", blocks, load=load)


# --- whose it is --------------------------------------------------------------------------------


def test_the_identity_is_that_of_weights_and_not_of_the_manifest(teacher, identity, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(teacher.path, plain)
    (plain / "trt_kd.json").unlink()
    assert identity_of(plain, precision="fp32") == identity


def test_other_weights_and_another_tokenizer_are_another_identity(
    make_model, tokenizer_dir, identity, tmp_path
):
    save_model(make_model(seed=7), tmp_path / "other", tokenizer_from=tokenizer_dir)
    other = identity_of(tmp_path / "other", precision="fp32")
    assert other.teacher != identity.teacher
    assert other.tokenizer == identity.tokenizer
    path = tmp_path / "other" / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert identity_of(tmp_path / "other", precision="fp32").tokenizer != identity.tokenizer
    path.unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        identity_of(tmp_path / "other", precision="fp32")
