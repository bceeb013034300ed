"""Write the rank files of a TensorRT-LLM checkpoint, one tensor in memory at a time.

Names and layouts are those of TensorRT-LLM's converters: ``mlp.fc`` is the activated branch
(``gate_proj``) and ``mlp.gate`` the other; ``attention.qkv`` holds a rank's query rows, then its
key rows, then its value rows; norms of Gemma are stored as weight + 1. Layers count from 0 in
every pipeline stage.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from trt_kd.architectures.shape import ModelShape
from trt_kd.errors import ModelError
from trt_kd.exporters.safetensors_stream import StreamedFile
from trt_kd.exporters.trtllm_layout import Ranks
from trt_kd.exporters.trtllm_scales import (
    fp8_tensors,
    int4_tensors,
    int8_tensors,
    ranges_of,
    smoothed_of,
)
from trt_kd.measuring.progress import Steps

Split = int | str | None
"""How ranks share a tensor: along a dimension, as ``qkv`` or ``vocab``, or each has all of it."""

_STORED: Mapping[str | None, torch.dtype] = {
    "FP8": torch.float8_e4m3fn,
    "W8A8_SQ_PER_CHANNEL": torch.int8,
    "W4A16_AWQ": torch.int8,
}
"""How a quantization algorithm stores its codes."""


@dataclass(frozen=True)
class Source:
    """Where the tensors come from and what they become."""

    shape: ModelShape
    ranks: Ranks
    dtype: torch.dtype
    """Of everything that is not quantized."""
    algorithm: str | None
    block: int | None
    """Weights along the input that share a scale; None where they do not come in blocks."""
    kv_cache: bool
    """Whether the key-value cache is FP8."""
    weights: Mapping[str, Tensor]
    """By Hugging Face name."""
    quantizers: Mapping[str, Tensor]
    """Ranges by Hugging Face name, and weights that calibration changed."""

    def tensor(self, name: str) -> Tensor:
        """Read a weight, as calibration left it.

        Raises:
            ModelError: if there is none.
        """
        for place in (self.quantizers, self.weights):
            if name in place:
                return place[name]
        raise ModelError(f"tensor {name} is missing", hint="import the model again")

    def plain(self, name: str, offset: float = 0.0) -> Tensor:
        """Read a weight in the checkpoint's dtype.

        Raises:
            ModelError: if there is none or it does not fit the dtype.
        """
        value = self.tensor(name)
        result = ((value.float() + offset) if offset else value).to(self.dtype)
        if not bool(result.isfinite().all()):
            raise ModelError(
                f"{name} is not finite in {self.dtype}", hint="export with dtype bfloat16"
            )
        return result


@dataclass(frozen=True)
class Item:
    """One tensor of a checkpoint, as it is before ranks share it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    split: Split = None


@dataclass(frozen=True)
class Piece:
    """Tensors that are made together."""

    items: tuple[Item, ...]
    make: Callable[[], Mapping[str, Tensor]]
    """Returns the items by name."""


@dataclass(frozen=True)
class Linear:
    """A projection of a decoder layer."""

    name: str
    parts: tuple[str, ...]
    """Hugging Face projections that it holds, one below the other."""
    rows: tuple[int, ...]
    columns: int
    split: Split
    bias: bool = False


def write_ranks(source: Source, out: Path) -> None:
    """Write ``rank0.safetensors`` and so on into ``out``.

    Raises:
        ModelError: if the source lacks a tensor or one does not fit.
    """
    ranks, pieces = source.ranks, list(_all_pieces(source))
    count = sum(len(stage) for stage in pieces)
    with Steps("writing tensors", count) as steps:
        for stage, stage_pieces in enumerate(pieces):
            with ExitStack() as stack:
                files = [
                    stack.enter_context(
                        StreamedFile(
                            out / f"rank{stage * ranks.tp + tp}.safetensors",
                            _announced(source, stage_pieces),
                        )
                    )
                    for tp in range(ranks.tp)
                ]
                for piece in stage_pieces:
                    _write(source, piece, files)
                    steps.step()


def _write(source: Source, piece: Piece, files: list[StreamedFile]) -> None:
    made = piece.make()
    for item in piece.items:
        if tuple(made[item.name].shape) != item.shape:
            raise ModelError(
                f"{item.name} would be {list(made[item.name].shape)}, config.json says "
                f"{list(item.shape)}",
                hint="config.json and the weights disagree; import the model again",
            )
        for rank, file in enumerate(files):
            file.put(item.name, share(source, made[item.name], item.split, rank))


def _announced(
    source: Source, pieces: list[Piece]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    items = (item for piece in pieces for item in piece.items)
    return {item.name: (item.dtype, share_shape(source, item)) for item in items}


def share_shape(source: Source, item: Item) -> tuple[int, ...]:
    """Shape of one rank's share of ``item``; all ranks have the same."""
    empty = torch.empty(item.shape, device="meta")
    return tuple(share(source, empty, item.split, 0).shape)


def share(source: Source, tensor: Tensor, split: Split, rank: int) -> Tensor:
    """The share of tensor parallel rank ``rank``."""
    tp, shape = source.ranks.tp, source.shape
    if split is None:
        return tensor
    if split == "vocab":
        rows = source.ranks.vocab(shape)
        padded = F.pad(tensor, (0, 0, 0, rows * tp - len(tensor)))
        return padded[rank * rows : (rank + 1) * rows]
    if split == "qkv":
        heads, kv_heads = shape.heads, shape.kv_heads
        size = len(tensor) // (heads + 2 * kv_heads)  # rows of a head; of codes, half as many
        query, key, value = torch.split(tensor, [n * size for n in (heads, kv_heads, kv_heads)])
        own = source.ranks.kv_heads(shape) * size
        start = rank * kv_heads // tp * size
        shared = (query.chunk(tp)[rank], *(t[start : start + own] for t in (key, value)))
        return torch.cat(shared)
    return tensor.chunk(tp, dim=int(split))[rank]


def _all_pieces(source: Source) -> Iterator[list[Piece]]:
    """Pieces of every pipeline stage, in turn."""
    shape, stages = source.shape, source.ranks.pp
    own = shape.layers // stages
    table = (shape.vocab, shape.hidden)
    for stage in range(stages):
        pieces = []
        if stage == 0:
            name = "transformer.vocab_embedding.weight"
            pieces.append(_plain(source, name, "model.embed_tokens.weight", table, "vocab"))
        for local in range(own):
            pieces += _layer(source, local, stage * own + local)
        if stage == stages - 1:
            pieces.append(_norm(source, "transformer.ln_f", "model.norm"))
            # A tied head is found beside the embedding; in a file of its own it must be written.
            if not shape.tied or stages > 1:
                head = "model.embed_tokens.weight" if shape.tied else "lm_head.weight"
                pieces.append(_plain(source, "lm_head.weight", head, table, "vocab"))
        yield pieces


def _layer(source: Source, local: int, layer: int) -> Iterator[Piece]:
    shape = source.shape
    own, theirs = f"transformer.layers.{local}", f"model.layers.{layer}"
    for ours, name in _norm_names(shape).items():
        yield _norm(source, f"{own}.{ours}", f"{theirs}.{name}")
    for linear in _linears(shape):
        yield _linear(source, linear, own, theirs)
    if shape.qk_norm == "head":
        for part in ("q", "k"):
            name, theirs_ = f"{own}.attention.{part}_layernorm.weight", f"{part}_norm.weight"
            size = (shape.head_dim,)
            yield _plain(source, name, f"{theirs}.self_attn.{theirs_}", size)
    if source.kv_cache:
        item = Item(f"{own}.attention.kv_cache_scaling_factor", torch.float32, (1,))
        yield Piece((item,), partial(_kv_scale, source, item.name, f"{theirs}.self_attn"))


def _norm_names(shape: ModelShape) -> dict[str, str]:
    names = {
        "input_layernorm": "input_layernorm",
        "post_layernorm": "post_attention_layernorm",
    }
    if shape.norms_per_layer == 4:
        names |= {
            f"{place}_feedforward_layernorm": f"{place}_feedforward_layernorm"
            for place in ("pre", "post")
        }
    return names


def _linears(shape: ModelShape) -> tuple[Linear, ...]:
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    hidden, ffn = shape.hidden, shape.ffn
    qkv = tuple(f"self_attn.{part}_proj" for part in "qkv")
    return (
        Linear("attention.qkv", qkv, (query, key, key), hidden, "qkv", shape.attention_bias),
        Linear("attention.dense", ("self_attn.o_proj",), (hidden,), query, 1, shape.output_bias),
        Linear("mlp.fc", ("mlp.gate_proj",), (ffn,), hidden, 0),
        Linear("mlp.gate", ("mlp.up_proj",), (ffn,), hidden, 0),
        Linear("mlp.proj", ("mlp.down_proj",), (hidden,), ffn, 1),
    )


def _plain(
    source: Source, name: str, theirs: str, shape: tuple[int, ...], split: Split = None
) -> Piece:
    item = Item(name, source.dtype, shape, split)
    return Piece((item,), lambda: {name: source.plain(theirs)})


def _norm(source: Source, name: str, theirs: str) -> Piece:
    from trt_kd.architectures import architecture_of

    offset = architecture_of(source.shape.model_type).norm_offset
    item = Item(f"{name}.weight", source.dtype, (source.shape.hidden,))
    return Piece((item,), lambda: {item.name: source.plain(f"{theirs}.weight", offset)})


def _linear(source: Source, linear: Linear, own: str, theirs: str) -> Piece:
    prefix = f"{own}.{linear.name}"
    rows, columns, split = sum(linear.rows), linear.columns, linear.split
    by_row, by_column = (None, 0) if split == 1 else (split, None)
    one, scale = (1,), torch.float32
    size = (rows // 2, columns) if source.block else (rows, columns)
    items = [Item(f"{prefix}.weight", _STORED.get(source.algorithm, source.dtype), size, split)]
    if source.block:
        blocks = (rows, columns // source.block)
        items.append(Item(f"{prefix}.weights_scaling_factor", scale, blocks, split))
    elif source.algorithm:
        shape, shared = (one, None) if source.algorithm == "FP8" else ((rows,), by_row)
        items.append(Item(f"{prefix}.activation_scaling_factor", scale, one))
        items.append(Item(f"{prefix}.weights_scaling_factor", scale, shape, shared))
    if source.algorithm not in (None, "FP8"):
        name = f"{prefix}.prequant_scaling_factor"
        items.append(Item(name, source.dtype, (columns,), by_column))
    if linear.bias:
        items.append(Item(f"{prefix}.bias", source.dtype, (rows,), by_row))
    return Piece(tuple(items), partial(_make_linear, source, linear, prefix, theirs))


def _make_linear(source: Source, linear: Linear, prefix: str, theirs: str) -> dict[str, Tensor]:
    parts = [f"{theirs}.{part}" for part in linear.parts]
    if source.algorithm is None:
        made = {"weight": torch.cat([source.plain(f"{part}.weight") for part in parts])}
    else:
        made = _low_bit(source, [(part, source.tensor(f"{part}.weight")) for part in parts])
    if linear.bias:
        made["bias"] = torch.cat([source.plain(f"{part}.bias") for part in parts])
    return {f"{prefix}.{name}": tensor for name, tensor in made.items()}


def _low_bit(source: Source, parts: Sequence[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Codes and scales of projections that are one matrix, from their names and weights."""
    if source.block:
        smoothed = [smoothed_of(name, weight, source.quantizers) for name, weight in parts]
        return int4_tensors(smoothed, source.dtype, source.block)
    ranges = [ranges_of(name, weight, source.quantizers) for name, weight in parts]
    return fp8_tensors(ranges) if source.algorithm == "FP8" else int8_tensors(ranges, source.dtype)


def _kv_scale(source: Source, name: str, attention: str) -> dict[str, Tensor]:
    """One scale for keys and values: TensorRT-LLM takes the larger of two anyway."""
    found = []
    for part in "kv":
        amax = f"{attention}.{part}_bmm_quantizer._amax"
        if amax not in source.quantizers:
            raise ModelError(f"{amax} is missing", hint="quantize the model again")
        found.append(source.quantizers[amax].float().max())
    return {name: (torch.stack(found).max() / 448.0).reshape(1)}
