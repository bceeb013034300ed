"""What chosen layers say during a forward pass, read by hooks that are gone after it.

Shape suffixes: B sequences, L positions, D width, H heads.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trt_kd.architectures import architecture_of
from trt_kd.architectures.hooks import hooks
from trt_kd.errors import ModelError
from trt_kd.losses.features.base import Reading
from trt_kd.training.attention import Attention, attending_by

Seen = dict[tuple[int, Reading], Tensor]
"""``[B, L, D]`` by layer and what is read of it."""


@contextmanager
def reading(model: PreTrainedModel, wanted: Sequence[tuple[int, Reading]]) -> Iterator[Seen]:
    """Fill what is yielded with what ``wanted`` layers of ``model`` say in the next forward pass.

    States are a layer's output, with the residual stream. Queries, keys and values are those that
    its attention takes, normalized and rotated where the model does so, heads side by side.

    Raises:
        ModelError: if attention is wanted and is not run by a function that can be watched.
    """
    seen: Seen = {}
    layers = architecture_of(model.config.model_type).layers(model)
    with hooks() as hook, ExitStack() as stack:
        for layer in {layer for layer, what in wanted if what == "states"}:
            hook(layers[layer], "output", partial(seen.__setitem__, (layer, "states")))
        watched = {
            id(module): layer
            for layer in {layer for layer, what in wanted if what != "states"}
            for module in layers[layer].modules()
        }
        if watched:
            together = {layer for layer, what in wanted if what == "attention"}
            wrap = partial(_kept, watched, together, seen)
            stack.enter_context(attending_by(_attention_of(model), wrap))
        yield seen


def _attention_of(model: PreTrainedModel) -> str:
    """Name of the function that computes its attention."""
    name: str = model.config._attn_implementation
    if name not in ALL_ATTENTION_FUNCTIONS:
        raise ModelError(
            f"the attention of {model.config.model_type} runs as {name!r}, whose queries and keys "
            "cannot be read",
            hint="take a feature loss on states instead",
        )
    return name


def _kept(watched: dict[int, int], together: set[int], seen: Seen, plain: Attention) -> Attention:
    """Attention that keeps its arguments and leaves the rest to ``plain``."""

    def keep(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any
    ) -> Any:
        layer = watched.get(id(module))
        if layer is not None:
            for what, heads_BHLD in (("queries", query), ("keys", key), ("values", value)):
                seen[layer, what] = heads_BHLD.transpose(1, 2).flatten(2)  # type: ignore[index]
            if layer in together:
                scale = more.get("scaling") or query.shape[-1] ** -0.5
                seen[layer, "attention"] = _together(scale * query, key, value)
        return plain(module, query, key, value, *rest, **more)

    return keep


def _together(queries_BHLD: Tensor, keys_BHLD: Tensor, values_BHLD: Tensor) -> Tensor:
    """All three side by side, ``[B, L, 3 H D]``; heads that queries share are repeated."""
    heads = queries_BHLD.shape[1]
    wide = [
        part.repeat_interleave(heads // part.shape[1], 1)
        for part in (queries_BHLD, keys_BHLD, values_BHLD)
    ]
    return torch.cat([part.transpose(1, 2).flatten(2) for part in wide], -1)
