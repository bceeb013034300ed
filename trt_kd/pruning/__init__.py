"""Structured pruning: which axis to shrink, what to keep, how to cut, how to make up for it.

To add an axis or an importance: write a module here, add one line below.
"""

from typing import TYPE_CHECKING

from trt_kd.registry import Registry

if TYPE_CHECKING:
    from trt_kd.pruning.base import Axis, Importance

AXES: Registry["type[Axis]"] = Registry(
    "pruning axis",
    # In the order of the cuts: heads within groups before groups, channels of experts before
    # experts, layers last.
    {
        "ffn": "trt_kd.pruning.ffn:FfnAxis",
        "heads": "trt_kd.pruning.heads:HeadsAxis",
        "kv_heads": "trt_kd.pruning.heads:KvHeadsAxis",
        "expert_ffn": "trt_kd.pruning.experts:ExpertFfnAxis",
        "experts": "trt_kd.pruning.experts:ExpertsAxis",
        "hidden": "trt_kd.pruning.hidden:HiddenAxis",
        "vocab": "trt_kd.pruning.vocabulary:VocabAxis",
        "depth": "trt_kd.pruning.depth:DepthAxis",
    },
)

IMPORTANCE: Registry["type[Importance]"] = Registry(
    "importance",
    {
        "activation": "trt_kd.pruning.importance:Activation",
        "block_influence": "trt_kd.pruning.importance:BlockInfluence",
        "perplexity": "trt_kd.pruning.perplexity:Perplexity",
        "random": "trt_kd.pruning.importance:Random",
        "taylor": "trt_kd.pruning.taylor:Taylor",
    },
)
