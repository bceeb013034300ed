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
        "llama": "trt_kd.architectures.llama:Llama",
        "mistral": "trt_kd.architectures.llama:LlamaLike",
        "qwen2": "trt_kd.architectures.llama:LlamaLike",
        "qwen3": "trt_kd.architectures.llama:LlamaLike",
        "smollm3": "trt_kd.architectures.llama:LlamaLike",
        "olmo2": "trt_kd.architectures.olmo:Olmo2",
        "gemma2": "trt_kd.architectures.gemma:Gemma2",
        "gemma3_text": "trt_kd.architectures.gemma:Gemma3",
        "phi3": "trt_kd.architectures.phi:Phi3",
        "gpt_neox": "trt_kd.architectures.neox:GptNeoX",
        "mixtral": "trt_kd.architectures.mixtral:Mixtral",
        "qwen3_moe": "trt_kd.architectures.qwen_moe:Qwen3Moe",
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
