"""One decoding step with its key-value cache as inputs and outputs, captured by torch.export.

Names are those of optimum and transformers.js: ``past_key_values.N.key`` in, ``present.N.key``
out. Masks are made here from the flat ``attention_mask``, so that left padding, the causal order
and sliding windows are part of the graph and every cache keeps its whole length.

Shape suffixes: B sequences, L new positions, P cached positions, T = P + L, V vocabulary.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trt_kd.architectures.shape import ModelShape
from trt_kd.exporters.onnx_qdq import LowBit, opset_of
from trt_kd.exporters.onnx_translation import translate
from trt_kd.exporters.onnx_writer import Graph, Value

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from transformers import PreTrainedModel

MASKED = -1e4
"""Added to a score that must not count: zero after softmax, and inside float16's range."""
MASK_PER_KIND = ("gemma2", "qwen2", "qwen3")
"""Model types whose layers choose among masks by kind; the others take one mask."""
BATCH, NEW = "batch_size", "sequence_length"
PAST, TOTAL = "past_sequence_length", "total_sequence_length"
_BATCH, _LENGTH, _PAST = 2, 4, 3  # no size is 0 or 1, which torch.export would take as fixed


class FlatCache:
    """What attention asks of a cache, over a list of key and value tensors layer by layer."""

    def __init__(self, past: list[Tensor]) -> None:
        self.tensors = list(past)

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Append the new positions of a layer and return all of its positions."""
        for place, new in ((2 * layer, key), (2 * layer + 1, value)):
            self.tensors[place] = torch.cat([self.tensors[place], new], dim=2)
        return self.tensors[2 * layer], self.tensors[2 * layer + 1]

    def get_seq_length(self, layer: int = 0) -> int:
        """Positions held by a layer."""
        return self.tensors[2 * layer].shape[2]


class DecoderStep(nn.Module):
    """Maps tokens and a flat cache to logits and the longer cache."""

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        switched_off = getattr(config, "use_sliding_window", True) is False
        self._window: int | None = None if switched_off else getattr(config, "sliding_window", None)
        self._per_kind = config.model_type in MASK_PER_KIND

    def forward(
        self,
        input_ids_BL: Tensor,
        attention_mask_BT: Tensor,
        position_ids_BL: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the step.

        ``past`` are key and value of every layer, ``[B, kv_heads, P, head_dim]``. Returns logits
        ``[B, L, V]`` in float32 and the cache with ``T`` positions.
        """
        cache = FlatCache(past)
        output = self.model(
            input_ids=input_ids_BL,
            attention_mask=self._masks(input_ids_BL, attention_mask_BT, past[0]),
            position_ids=position_ids_BL,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits.float(), cache.tensors

    def _masks(self, ids_BL: Tensor, real_BT: Tensor, past: Tensor) -> Any:
        key_T = torch.arange(real_BT.shape[1])
        query_L1 = (torch.arange(ids_BL.shape[1]) + past.shape[2])[:, None]
        seen_BLT = (key_T <= query_L1) & (real_BT != 0)[:, None, :]
        full = _additive(seen_BLT, past.dtype)
        if self._window is None:
            return {"full_attention": full} if self._per_kind else full
        near = _additive(seen_BLT & (key_T > query_L1 - self._window), past.dtype)
        return {"full_attention": full, "sliding_attention": near} if self._per_kind else near


def _additive(seen_BLT: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(seen_BLT, 0.0, MASKED).to(dtype)[:, None]


def cache_names(prefix: str, layers: int) -> list[str]:
    """Names of the key and value tensors of every layer, in order."""
    return [f"{prefix}.{n}.{part}" for n in range(layers) for part in ("key", "value")]


def interface(shape: ModelShape, dtype: str) -> tuple[dict[str, Value], dict[str, Value]]:
    """Inputs and outputs of the graph by name, each with its type and its dimensions.

    ``dtype`` is the numpy name of the cache's type.
    """
    new: Value = ("int64", (BATCH, NEW))
    heads, width = shape.kv_heads, shape.head_dim
    past: Value = (dtype, (BATCH, heads, PAST, width))
    present: Value = (dtype, (BATCH, heads, TOTAL, width))
    inputs = {"input_ids": new, "attention_mask": ("int64", (BATCH, TOTAL)), "position_ids": new}
    outputs: dict[str, Value] = {"logits": ("float32", (BATCH, NEW, shape.vocab))}
    inputs |= dict.fromkeys(cache_names("past_key_values", shape.layers), past)
    outputs |= dict.fromkeys(cache_names("present", shape.layers), present)
    return inputs, outputs


def write_step(
    model: "PreTrainedModel",
    shape: ModelShape,
    out: Path,
    low_bit: "Mapping[str, LowBit] | None" = None,
) -> int:
    """Write one step of ``model`` into the directory ``out``; return the graph's nodes.

    ``low_bit`` are the projections that are quantized, by the names of their weights.

    Raises:
        ModelError: if the model uses an operator that is not known here.
    """
    inputs, outputs = interface(shape, str(model.dtype).removeprefix("torch."))
    with Graph(out, opset_of(low_bit or {})) as graph:
        values = translate(capture(model, shape), graph, list(inputs), low_bit)
        for value, name in zip(values, outputs, strict=True):
            graph.rename(value, name)
        return graph.write(inputs, outputs)


def capture(model: "PreTrainedModel", shape: ModelShape) -> "ExportedProgram":
    """Capture one step of ``model``; batch, length and past length stay free."""
    ids = torch.ones(_BATCH, _LENGTH, dtype=torch.long)
    sizes = (_BATCH, shape.kv_heads, _PAST, shape.head_dim)
    past = [torch.zeros(sizes, dtype=model.dtype) for _ in range(2 * shape.layers)]
    real = torch.ones(_BATCH, _PAST + _LENGTH, dtype=torch.long)
    free = torch.export.Dim.AUTO
    flat = {0: free, 1: free}
    set_attention: Any = model.set_attn_implementation
    set_attention("eager")
    with torch.no_grad():
        return torch.export.export(
            DecoderStep(model).eval(),
            (ids, real, ids.clone(), past),
            dynamic_shapes=(flat, flat, flat, [{0: free, 2: free}] * len(past)),
        )
