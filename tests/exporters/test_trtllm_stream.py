"""Streamed safetensors files, with the library's own reader as the reference."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from trt_kd.exporters.safetensors_stream import TYPES, StreamedFile

GENERATOR = torch.Generator().manual_seed(0)
TENSORS = {
    f"{dtype}.{number}".removeprefix("torch."): (10 * torch.randn(shape, generator=GENERATOR)).to(
        dtype
    )
    for dtype in TYPES
    for number, shape in enumerate([(1,), (3, 5), (7,)])
}
ANNOUNCED = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def test_tensors_of_every_type_in_any_order_read_back_bit_by_bit(tmp_path):
    path = tmp_path / "a.safetensors"
    with StreamedFile(path, ANNOUNCED) as file:
        for name in sorted(TENSORS, key=lambda name: name[::-1]):
            file.put(name, TENSORS[name])
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8))
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_share_that_is_not_contiguous_is_written_as_it_reads(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    with StreamedFile(tmp_path / "a", {"t": (torch.float32, (3, 2))}) as file:
        file.put("t", whole.chunk(2, dim=1)[1])
    assert torch.equal(load_file(tmp_path / "a")["t"], whole[:, 2:])


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("b", torch.zeros(2), "not announced"),
        ("a", torch.zeros(3), "announced as"),
        ("a", torch.zeros(2, dtype=torch.float16), "announced as"),
    ],
)
def test_what_was_not_announced_is_refused(tmp_path, name, tensor, reason):
    with (
        pytest.raises(ValueError, match=reason),
        StreamedFile(tmp_path / "a", {"a": (torch.float32, (2,))}) as file,
    ):
        file.put(name, tensor)


def put_all(path, names):
    announced = {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}
    with StreamedFile(path, announced) as file:
        for name in names:
            file.put(name, torch.zeros(2))


@pytest.mark.parametrize(
    ("names", "reason"), [("a", "1 tensors were not written: b"), ("aa", "written twice")]
)
def test_a_tensor_that_was_left_out_or_comes_twice_is_an_error(tmp_path, names, reason):
    with pytest.raises(ValueError, match=reason):
        put_all(tmp_path / "a", names)
