"""Model families: where a decoder keeps its layers, heads, norms and embeddings.

To add one: write a module here, add one line below under its ``model_type``.
"""

from typing import TYPE_CHECKING

from trt_kd.errors import ModelError
from trt_kd.registry import Registry

if TYPE_CHECKING:
    from trt_kd.architectures.base import Architecture

ARCHITECTURES: Registry["type[Architecture]"] = Registry(
    "architecture",
    {
        "llama": "trt_kd.architectures.llama:LlamaLike",
        "mistral": "trt_kd.architectures.llama:LlamaLike",
        "qwen2": "trt_kd.architectures.llama:LlamaLike",
        "qwen3": "trt_kd.architectures.llama:LlamaLike",
    },
)


def architecture_of(model_type: str) -> "Architecture":
    """Return the architecture of a ``config.json``'s ``model_type``; needs no torch.

    Raises:
        ModelError: if models of that type cannot be taken apart here.
    """
    if model_type not in ARCHITECTURES.names():
        raise ModelError(
            f"model_type {model_type!r} is not supported; "
            f"supported: {', '.join(ARCHITECTURES.names())}",
            hint="describe it in a module of trt_kd/architectures/ and add a line to "
            "ARCHITECTURES in its __init__.py",
        )
    return ARCHITECTURES.load(model_type)()
