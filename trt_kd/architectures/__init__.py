"""Model families: where a decoder keeps its layers, heads, norms and embeddings.

To add one: write a module here, add one line below under its ``model_type``.
"""

from typing import TYPE_CHECKING

from trt_kd.registry import Registry

if TYPE_CHECKING:
    from trt_kd.architectures.base import Architecture

ARCHITECTURES: Registry["type[Architecture]"] = Registry("architecture", {})
