"""Read a TensorRT-LLM checkpoint and compute what an engine built from it computes.

The stock architecture is rebuilt from ``config.json`` and the rank files of any tensor and
pipeline parallel split are put together again, dequantized where they are FP8, INT8 or INT4. The
writer is not involved: this is the witness of what it wrote.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trt_kd.backends.base import Backend, Session
from trt_kd.errors import ModelError
from trt_kd.exporters.hf_unified_files import Tensors, open_tensors
from trt_kd.exporters.hf_unified_reader import empty_model
from trt_kd.exporters.trtllm_format import Layout, expected_headers, read_layout, stock_config
from trt_kd.optional import require

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_NORMS = {
    "input_layernorm": "input_layernorm",
    "post_layernorm": "post_attention_layernorm",
    "pre_feedforward_layernorm": "pre_feedforward_layernorm",
    "post_feedforward_layernorm": "post_feedforward_layernorm",
    "attention.q_layernorm": "self_attn.q_norm",
    "attention.k_layernorm": "self_attn.k_norm",
}


class TrtllmReader(Backend):
    """A TensorRT-LLM checkpoint, its ranks joined and its arithmetic simulated in float32."""

    kind: Literal["trtllm-checkpoint"] = "trtllm-checkpoint"

    def load(self, directory: Path) -> Session:
        """See the base class."""
        torch = require("torch", extra="compress")
        from trt_kd.backends.transformers import TransformersSession

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return TransformersSession(read_model(directory))


@dataclass(frozen=True)
class Projection:
    """A projection of the stock model, whole again."""

    name: str
    weight: "Tensor"
    """``[O, I]`` float32, dequantized."""
    bias: "Tensor | None"
    input_scale: "Tensor | None" = None
    smoothing: "Tensor | None" = None
    """Factor ``[I]`` on the input."""
    step: "Tensor | None" = None
    """Scale ``[O, G]`` of every block of INT4 codes, as an engine rounds it."""


class Ranks:
    """The files of all ranks; tensors are joined when asked for."""

    def __init__(self, layout: Layout, files: list[Tensors]) -> None:
        self.layout = layout
        self._files = files

    def copies(self, stage: int, name: str) -> "Tensor":
        """A tensor of which every rank of a pipeline stage has a copy.

        Raises:
            ModelError: if the copies differ.
        """
        first, *others = self._all(stage, name)
        if any(not _equal(first, other) for other in others):
            raise ModelError(f"{name} of pipeline stage {stage} differs between ranks")
        return first

    def joined(self, stage: int, name: str, dim: int) -> "Tensor":
        """A tensor that ranks share along a dimension."""
        import torch

        return torch.cat(self._all(stage, name), dim)

    def table(self, stage: int, name: str) -> "Tensor":
        """A table of the vocabulary, without its padding.

        Raises:
            ModelError: if padded rows are not zero.
        """
        whole = self.joined(stage, name, 0)
        count = int(self.layout["vocab_size"])
        if bool(whole[count:].any()):
            raise ModelError(f"{name}: rows beyond the vocabulary of {count} are not zero")
        return whole[:count]

    def qkv(self, stage: int, name: str) -> "list[Tensor]":
        """Query, key and value rows of a fused tensor, copies of key-value heads left out.

        Raises:
            ModelError: if copies of a head differ.
        """
        import torch

        heads, kv_heads = self.layout.rank_heads
        tensors = self._all(stage, name)
        size = len(tensors[0]) // (heads + 2 * kv_heads)  # rows of a head; of codes, half as many
        sizes = [heads * size, kv_heads * size, kv_heads * size]
        cut = (torch.split(tensor, sizes) for tensor in tensors)
        shares = list(zip(*cut, strict=True))
        copies = self.layout.tp * kv_heads // int(self.layout["num_key_value_heads"])
        for share in shares[1:]:
            for rank, tensor in enumerate(share):
                if not _equal(tensor, share[rank - rank % copies]):
                    raise ModelError(f"{name}: ranks hold different copies of one head")
        return [torch.cat(shares[0]), *(torch.cat(share[::copies]) for share in shares[1:])]

    def weight_headers(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Type and shape of every matrix of every rank, tables of the vocabulary included.

        Shapes are in weights, also where two codes share a byte.
        """
        for tensors in self._files:
            for name in tensors:
                kind, shape = tensors.header(name)
                if name.endswith(".weight") and len(shape) > 1:
                    packed = self.layout.block is not None and kind == "I8"
                    yield kind, (2 * shape[0], *shape[1:]) if packed else shape

    def _all(self, stage: int, name: str) -> "list[Tensor]":
        tp = self.layout.tp
        return [self._files[stage * tp + rank][name] for rank in range(tp)]


@contextmanager
def open_ranks(directory: Path) -> Iterator[Ranks]:
    """Open the checkpoint in ``directory``; every header is compared with ``config.json``.

    Raises:
        ModelError: if a file is missing, damaged or too many, or a tensor is missing, too many,
            misshapen or of another type.
    """
    layout = read_layout(directory)
    expected = {f"rank{rank}.safetensors" for rank in range(layout.tp * layout.pp)}
    found = {path.name for path in directory.glob("*.safetensors")}
    if expected != found:
        raise ModelError(
            f"{directory}: {', '.join(sorted(expected ^ found))} missing or too many for "
            f"tp {layout.tp} and pp {layout.pp}"
        )
    with ExitStack() as stack:
        files = []
        for rank in range(len(expected)):
            only = f"rank{rank}.safetensors"
            files.append(stack.enter_context(open_tensors(directory, only=only)))
            if problems := header_problems(layout, rank, files[-1]):
                raise ModelError(f"{directory / only}: {problems[0]}")
        yield Ranks(layout, files)


def header_problems(layout: Layout, rank: int, tensors: Tensors) -> list[str]:
    """What the header of one rank's file says against ``config.json``."""
    expected = expected_headers(layout, rank)
    found = [f"tensor {name} is missing" for name in sorted(set(expected) - set(tensors))]
    found += [f"tensor {name} has no place" for name in sorted(set(tensors) - set(expected))]
    for name in sorted(set(expected) & set(tensors)):
        if tensors.header(name) != expected[name]:
            found.append(f"{name} is {tensors.header(name)}, config.json asks for {expected[name]}")
    return found


def plain_tensors(ranks: Ranks) -> "Iterator[tuple[str, Tensor]]":
    """Parameters that are never quantized, by Hugging Face name, in float32."""
    layout = ranks.layout
    offset = 1.0 if layout.model_type == "gemma2" else 0.0
    last = layout.pp - 1
    yield "model.embed_tokens.weight", ranks.table(0, "transformer.vocab_embedding.weight").float()
    for stage, own, theirs in _layers(layout):
        for ours, name in _NORMS.items():
            if f"{own}.{ours}.weight" in expected_headers(layout, stage * layout.tp):
                norm = ranks.copies(stage, f"{own}.{ours}.weight").float()
                yield f"{theirs}.{name}.weight", norm - offset
    yield "model.norm.weight", ranks.copies(last, "transformer.ln_f.weight").float() - offset
    if "lm_head.weight" in expected_headers(layout, last * layout.tp):
        yield "lm_head.weight", ranks.table(last, "lm_head.weight").float()


def projections(ranks: Ranks) -> Iterator[Projection]:
    """Every projection of every layer, dequantized.

    Raises:
        ModelError: if a scale is not a finite number above zero.
    """
    for stage, own, theirs in _layers(ranks.layout):
        yield from _fused(ranks, stage, f"{own}.attention.qkv", f"{theirs}.self_attn")
        dense = f"{own}.attention.dense"
        yield _single(ranks, stage, dense, f"{theirs}.self_attn.o_proj", dim=1)
        yield _single(ranks, stage, f"{own}.mlp.fc", f"{theirs}.mlp.gate_proj", dim=0)
        yield _single(ranks, stage, f"{own}.mlp.gate", f"{theirs}.mlp.up_proj", dim=0)
        yield _single(ranks, stage, f"{own}.mlp.proj", f"{theirs}.mlp.down_proj", dim=1)
        if ranks.layout.fp8_cache:
            _positive(ranks.copies(stage, f"{own}.attention.kv_cache_scaling_factor"), own)


def _layers(layout: Layout) -> Iterator[tuple[int, str, str]]:
    """Pipeline stage, own and Hugging Face prefix of every layer."""
    for layer in range(int(layout["num_hidden_layers"])):
        stage, local = divmod(layer, layout.stage_layers)
        yield stage, f"transformer.layers.{local}", f"model.layers.{layer}"


def _fused(ranks: Ranks, stage: int, name: str, theirs: str) -> Iterator[Projection]:
    weights = ranks.qkv(stage, f"{name}.weight")
    biases: list[Any] = [None] * 3
    if ranks.layout["attn_bias"]:
        biases = [bias.float() for bias in ranks.qkv(stage, f"{name}.bias")]
    scales: list[Any] = [None] * 3
    if ranks.layout.algorithm == "FP8":
        scales = [ranks.copies(stage, f"{name}.weights_scaling_factor")] * 3
    elif ranks.layout.algorithm:
        scales = ranks.qkv(stage, f"{name}.weights_scaling_factor")
    input_scale, smoothing = _input(ranks, stage, name, dim=0)
    for part, weight, scale, bias in zip("qkv", weights, scales, biases, strict=True):
        whole, step = _dequantized(ranks.layout, weight, scale, name)
        yield Projection(f"{theirs}.{part}_proj", whole, bias, input_scale, smoothing, step)


def _single(ranks: Ranks, stage: int, name: str, theirs: str, *, dim: int) -> Projection:
    scale = None
    if ranks.layout.block is not None:
        scale = ranks.joined(stage, f"{name}.weights_scaling_factor", dim)
    elif ranks.layout.algorithm == "FP8" or (ranks.layout.algorithm and dim == 1):
        scale = ranks.copies(stage, f"{name}.weights_scaling_factor")
    elif ranks.layout.algorithm:
        scale = ranks.joined(stage, f"{name}.weights_scaling_factor", 0)
    weight = ranks.joined(stage, f"{name}.weight", dim)
    whole, step = _dequantized(ranks.layout, weight, scale, name)
    bias = None
    if f"{name}.bias" in expected_headers(ranks.layout, stage * ranks.layout.tp):
        bias = ranks.copies(stage, f"{name}.bias").float()
    return Projection(theirs, whole, bias, *_input(ranks, stage, name, dim=dim), step)


def _input(
    ranks: Ranks, stage: int, name: str, *, dim: int
) -> "tuple[Tensor | None, Tensor | None]":
    """Scale of the activation and factor on it."""
    if ranks.layout.algorithm is None:
        return None, None
    scale = None
    if ranks.layout.block is None:
        scale = _positive(ranks.copies(stage, f"{name}.activation_scaling_factor"), name)
    if ranks.layout.algorithm == "FP8":
        return scale, None
    factor = f"{name}.prequant_scaling_factor"
    smoothing = ranks.joined(stage, factor, 0) if dim == 1 else ranks.copies(stage, factor)
    return scale, _positive(smoothing, factor).float()


def _dequantized(
    layout: Layout, weight: "Tensor", scale: "Tensor | None", name: str
) -> "tuple[Tensor, Tensor | None]":
    """Weight in float32, and the steps of its INT4 codes."""
    import torch

    from trt_kd.exporters import arithmetic

    if scale is None:
        return weight.float(), None
    _positive(scale, f"{name}.weights_scaling_factor")
    if layout.block is not None:
        step_OG = scale.to(getattr(torch, layout["dtype"])).float()
        return arithmetic.int4_weight(weight.view(torch.uint8), step_OG), step_OG
    dequantize = arithmetic.fp8_weight if layout.algorithm == "FP8" else arithmetic.int8_weight
    return dequantize(weight, scale), None


def _equal(one: "Tensor", other: "Tensor") -> bool:
    """Whether two tensors hold the same numbers; FP8 ones do not compare by themselves."""
    return bool((one.float() == other.float()).all())


def _positive(scale: "Tensor", name: str) -> "Tensor":
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise ModelError(f"a scale of {name} is not a finite number above zero")
    return scale


def read_model(directory: Path) -> "PreTrainedModel":
    """Build the model in ``directory`` as an engine computes it, in float32 on the CPU.

    Raises:
        ModelError: if the files contradict each other; see ``open_ranks``.
    """
    import torch
    from torch import nn

    with open_ranks(directory) as ranks:
        model: Any = empty_model(stock_config(ranks.layout), directory)
        for name, tensor in plain_tensors(ranks):
            _set(model, name, nn.Parameter(tensor, requires_grad=False))
        for projection in projections(ranks):
            _set(model, projection.name, _linear(projection, ranks.layout.algorithm))
        tied = ranks.layout["share_embedding_table"]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if tied:
        written = head.weight
        if not written.is_meta and not torch.equal(written, embedding.weight):
            raise ModelError(f"{directory}: the head is said to be the embedding, but differs")
        head.weight = embedding.weight
    if left := [name for name, value in model.named_parameters() if value.is_meta]:
        raise ModelError(f"{directory}: nothing fills {left[0]}")
    return model.eval()  # type: ignore[no-any-return]


def _set(model: Any, name: str, value: Any) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, value)


def _linear(projection: Projection, algorithm: str | None) -> Any:
    from trt_kd.exporters import arithmetic

    rounds = {"FP8": arithmetic.fp8_input, "W8A8_SQ_PER_CHANNEL": arithmetic.int8_input}
    round_input = None
    if algorithm is not None and projection.input_scale is not None:
        round_input = partial(rounds[algorithm], scale=projection.input_scale)
    return arithmetic.DeployedLinear(
        projection.weight,
        projection.bias,
        pre_quant_scale_I=projection.smoothing,
        round_input=round_input,
    )
