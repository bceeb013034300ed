"""Decoders built like Llama: Llama, Mistral, Qwen2 (biases on q, k, v), Qwen3 (norms on q, k).

SmolLM3 too, which has no rotary positions in some layers: the config's list of them is cut along.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, cast

from trt_kd.architectures.base import (
    Architecture,
    Attention,
    Mlp,
    Readers,
    Slice,
    columns,
    norm_slices,
    rows,
    update,
)

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


JOINT = ("qkv_proj", "gate_up_proj")
"""Names for all that read the stream in an attention block and in an MLP, experts included."""


class LlamaLike(Architecture):
    """RMSNorm before attention and before a gated MLP, one residual stream, rotary positions."""

    norm_names: ClassVar[tuple[str, ...]] = ("input_layernorm", "post_attention_layernorm")
    read_norms: ClassVar[tuple[str | None, str | None]] = (
        "input_layernorm",
        "post_attention_layernorm",
    )
    """Norms whose outputs attention and MLP read; None where they read the stream itself."""
    attention_readers: ClassVar[tuple[str, ...]] = tuple(f"self_attn.{n}_proj" for n in "qkv")
    """Linears of a layer that turn the residual stream into queries, keys and values."""
    attention_writer: ClassVar[str] = "self_attn.o_proj"
    mlp_readers: ClassVar[tuple[str, ...]] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_writer: ClassVar[str] = "mlp.down_proj"
    config_names: ClassVar[Mapping[str, str]] = {
        "ffn": "intermediate_size",
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "vocab": "vocab_size",
    }
    """What the fields of ``ModelShape`` are called in a config."""
    module_names: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "ffn": ("intermediate_size",),
        "hidden": ("hidden_size", "hidden_dim"),
        "heads": ("num_heads", "num_attention_heads"),
        "kv_heads": ("num_key_value_heads",),
        "vocab": ("vocab_size",),
    }
    """Attributes of modules that repeat them."""

    def norms(self, layer: "nn.Module") -> "tuple[nn.Module, ...]":
        """See the base class."""
        return tuple(layer.get_submodule(name) for name in self.norm_names)

    def mlp(self, layer: "nn.Module") -> Mlp | None:
        """See the base class."""
        if self.experts(layer) is not None:
            return None
        down = _linear(layer, self.mlp_writer)
        readers = [_linear(layer, name) for name in self.mlp_readers]
        makers = [entry for linear in readers for entry in rows(linear, down.in_features)]
        return Mlp(tuple(makers), down)

    def attention(self, layer: "nn.Module") -> Attention:
        """See the base class."""
        q, k, v = (_linear(layer, name) for name in self.attention_readers)
        head_dim = cast("int", layer.get_submodule("self_attn").head_dim)
        heads, kv_heads = q.out_features // head_dim, k.out_features // head_dim
        return Attention(
            query=rows(q, heads),
            key_value=(*rows(k, kv_heads), *rows(v, kv_heads)),
            o=_linear(layer, self.attention_writer),
            heads=heads,
            kv_heads=kv_heads,
        )

    def residual(self, layer: "nn.Module") -> "tuple[Slice, ...]":
        """See the base class."""
        experts = self.experts(layer)
        readers = self.attention_readers + (self.mlp_readers if experts is None else ())
        writers = (self.attention_writer, *([self.mlp_writer] if experts is None else []))
        found = [entry for norm in self.norms(layer) for entry in norm_slices(norm)]
        linears = [_linear(layer, name) for name in readers]
        found += [columns(linear, linear.in_features) for linear in linears]
        for linear in (_linear(layer, name) for name in writers):
            found += rows(linear, linear.out_features)
        return (*found, *(() if experts is None else experts.residual))

    def readers(self, layer: "nn.Module") -> "tuple[Readers, Readers]":
        """See the base class."""
        experts = self.experts(layer)
        blocks = [layer.get_submodule(self.attention_writer.partition(".")[0])]
        if experts is None:
            blocks.append(layer.get_submodule(self.mlp_writer.partition(".")[0]))
        else:
            blocks.append(experts.module)
        router = None if experts is None else experts.router
        found = []
        for block, name, norm in zip(blocks, JOINT, self.read_norms, strict=True):
            inside = [entry for entry in self.residual(layer) if _reads(entry, block)]
            weights = {
                name: tuple(entry for entry in inside if entry.module is not router),
                "router": tuple(entry for entry in inside if entry.module is router),
            }
            found.append(
                Readers(
                    block=block,
                    norm=None if norm is None else layer.get_submodule(norm),
                    weights={name: entries for name, entries in weights.items() if entries},
                )
            )
        attention, mlp = found
        return attention, mlp

    def after_hidden(self, model: "PreTrainedModel", before: int, after: int) -> None:
        """Nothing to do: the code derives nothing from the hidden size."""

    def record(self, model: "PreTrainedModel", **sizes: int) -> None:
        """See the base class."""
        config = model.config
        if not getattr(config, "head_dim", None):
            config.head_dim = config.hidden_size // config.num_attention_heads
        for size, value in sizes.items():
            before = getattr(config, self.config_names[size])
            setattr(config, self.config_names[size], value)
            for module in model.modules():
                for attribute in self.module_names[size]:
                    if getattr(module, attribute, None) == before:
                        setattr(module, attribute, value)
        if hasattr(config, "num_key_value_heads"):
            groups = config.num_attention_heads // config.num_key_value_heads
            for module in model.modules():
                update(module, "num_key_value_groups", groups)


class Llama(LlamaLike):
    """As most decoders (``LlamaLike``), with a hidden size that is a multiple of the heads."""

    whole_heads: ClassVar[bool] = True


def _reads(entry: Slice, block: "nn.Module") -> bool:
    """Whether it is a weight inside ``block`` with the hidden size as its last dimension."""
    weight = entry.module.get_parameter(entry.name)
    return weight.dim() > 1 and entry.dim == weight.dim() - 1 and entry.module in block.modules()


def _linear(layer: "nn.Module", name: str) -> "nn.Linear":
    return cast("nn.Linear", layer.get_submodule(name))
