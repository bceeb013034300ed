"""What a step of a decoder does, in units that its time is proportional to.

On one runtime, at one batch size and prompt length, the time of a step is close to a sum over kinds
of operators: a constant, something per layer, and something per weight of attention, MLP and head
(products), per value of the key-value cache (decoding) or pair of query head and token (prefill).
All are closed forms that hold for shapes of numbers and of arrays alike.
"""

from collections.abc import Mapping
from typing import Any, Literal

from trt_kd.architectures.shape import ModelShape
from trt_kd.errors import ModelError

Metric = Literal["ttft_ms", "itl_ms"]
"""Time to first token and inter-token latency, in milliseconds."""
METRICS: tuple[Metric, ...] = ("ttft_ms", "itl_ms")

SIZES = ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab")
"""Fields of a shape that the amounts depend on."""

OPERATORS: Mapping[str, str] = {
    "step": "everything that is done once per step",
    "layer": "norms, additions and launches of one layer",
    "attention": "a weight of query, key, value and output projections",
    "mlp": "a weight of the MLP",
    "head": "a weight of the head",
    "context": "a channel of attention over the context",
}
"""Every kind of operator and what its amount counts."""


def amounts(shape: ModelShape, metric: Metric) -> dict[str, Any]:
    """How much of every operator one step of ``shape`` does; entries are numbers or arrays.

    Raises:
        ModelError: if the model is a mixture of experts, whose steps read what the router picks.
    """
    if shape.experts:
        raise ModelError(
            f"the latency of a mixture of experts ({shape.experts} experts) is not predicted",
            hint="limit params, active_params or memory_mb, and measure what was found",
        )
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    matrices = 3 if shape.gated else 2
    return {
        "step": 1.0,
        "layer": shape.layers * 1.0,
        "attention": shape.layers * shape.hidden * (2.0 * query + 2.0 * key),
        "mlp": shape.layers * shape.hidden * shape.ffn * float(matrices),
        "head": shape.hidden * float(shape.vocab),
        "context": shape.layers * 1.0 * (query if metric == "ttft_ms" else key),
    }
