"""Structured pruning: which axis to shrink, what to keep, how to cut, how to make up for it.

To add an axis or an importance: write a module here, add one line below.
"""

from typing import TYPE_CHECKING

from trt_kd.registry import Registry

if TYPE_CHECKING:
    from trt_kd.pruning.base import Axis, Importance

AXES: Registry["type[Axis]"] = Registry(
    "pruning axis",
    {
        "ffn": "trt_kd.pruning.ffn:FfnAxis",
        "hidden": "trt_kd.pruning.hidden:HiddenAxis",
        "depth": "trt_kd.pruning.depth:DepthAxis",
    },
)

IMPORTANCE: Registry["type[Importance]"] = Registry(
    "importance",
    {
        "activation": "trt_kd.pruning.importance:Activation",
        "block_influence": "trt_kd.pruning.importance:BlockInfluence",
        "random": "trt_kd.pruning.importance:Random",
    },
)
