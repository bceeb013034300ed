"""What a step of a decoder does, in units that its time is proportional to.

On one runtime, at one batch size and prompt length, the time of a step is close to a sum over kinds
of operators: a constant, something per layer, and something per weight of attention, MLP and head
(products), per value of the key-value cache (decoding) or pair of query head and token (prefill).
A layer of experts reads the weights of every expert that one of the step's tokens is sent to, and
multiplies each token with the few that it is sent to: two amounts, beside the router's.
All are closed forms that hold for shapes of numbers and of arrays alike.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from trt_kd.architectures.shape import ModelShape

Metric = Literal["ttft_ms", "itl_ms"]
"""Time to first token and inter-token latency, in milliseconds."""
METRICS: tuple[Metric, ...] = ("ttft_ms", "itl_ms")

SIZES = (
    "layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab", "experts", "expert_ffn"
)  # fmt: skip
"""Fields of a shape that the amounts depend on."""

OPERATORS: Mapping[str, str] = {
    "step": "everything that is done once per step",
    "layer": "norms, additions and launches of one layer",
    "attention": "a weight of query, key, value and output projections",
    "mlp": "a weight of the MLP",
    "head": "a weight of the head",
    "context": "a channel of attention over the context",
    "router": "a weight of the routers",
    "experts": "a weight of the experts that the step is expected to read",
    "routed": "a weight of the experts that one token passes through",
}
"""Every kind of operator and what its amount counts."""


def amounts(shape: ModelShape, metric: Metric, tokens: int = 1) -> dict[str, Any]:
    """How much of every operator one step of ``shape`` does; entries are numbers or arrays.

    ``tokens`` are those that the step works on: they decide how many experts it reads, and
    nothing else. A dense model has no amounts of experts.
    """
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    matrices = 3 if shape.gated else 2
    mixture = bool(np.any(shape.experts))
    dense = shape.dense_layers if mixture else shape.layers
    found = {
        "step": 1.0,
        "layer": shape.layers * 1.0,
        "attention": shape.layers * shape.hidden * (2.0 * query + 2.0 * key),
        "mlp": dense * shape.hidden * shape.ffn * float(matrices),
        "head": shape.hidden * float(shape.vocab),
        "context": shape.layers * 1.0 * (query if metric == "ttft_ms" else key),
    }
    return found | (_of_experts(shape, tokens) if mixture else {})


def experts_read(experts: Any, per_token: int, tokens: int) -> Any:
    """Expected number of experts that ``tokens`` tokens are sent to, ``per_token`` each.

    An expert is left out by a token with probability 1 - k / E where the router prefers none, as
    training for balance makes it, and by all where tokens choose apart: E (1 - (1 - k / E)^T).
    """
    return experts * (1.0 - (1.0 - per_token / experts) ** tokens)


def _of_experts(shape: ModelShape, tokens: int) -> dict[str, Any]:
    layers = shape.layers - shape.dense_layers
    expert = 3.0 * shape.hidden * shape.expert_ffn
    per_token = shape.experts_per_token
    return {
        "router": layers * 1.0 * shape.hidden * shape.experts,
        "experts": layers * expert * experts_read(shape.experts, per_token, tokens),
        "routed": layers * expert * per_token,
    }
