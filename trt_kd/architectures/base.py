"""What pruning has to know about a family of decoders; importing it needs no torch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class Mlp(NamedTuple):
    """The three projections of a gated MLP: ``down(act(gate(x)) * up(x))``."""

    gate: "nn.Linear"
    up: "nn.Linear"
    down: "nn.Linear"


class Attention(NamedTuple):
    """The four projections of an attention block."""

    q: "nn.Linear"
    k: "nn.Linear"
    v: "nn.Linear"
    o: "nn.Linear"


class Architecture(ABC):
    """Where the decoders of one family keep their parts, and how their sizes are recorded."""

    @abstractmethod
    def layers(self, model: "PreTrainedModel") -> "nn.ModuleList":
        """Decoder layers, first to last."""

    @abstractmethod
    def embedding(self, model: "PreTrainedModel") -> "nn.Embedding":
        """Token embedding, ``[vocabulary, hidden]``."""

    @abstractmethod
    def final_norm(self, model: "PreTrainedModel") -> "nn.Module":
        """Norm between the last layer and the head."""

    @abstractmethod
    def head(self, model: "PreTrainedModel") -> "nn.Linear":
        """Projection to the vocabulary; its weight may be the embedding's."""

    @abstractmethod
    def mlp(self, layer: "nn.Module") -> Mlp:
        """MLP projections of one layer."""

    @abstractmethod
    def attention(self, layer: "nn.Module") -> Attention:
        """Attention projections of one layer."""

    @abstractmethod
    def norms(self, layer: "nn.Module") -> "tuple[nn.Module, nn.Module]":
        """The two norms over the hidden size that read the residual: attention's, the MLP's."""

    @abstractmethod
    def record_ffn(self, model: "PreTrainedModel", size: int) -> None:
        """Write a new intermediate size into the config and the modules that repeat it."""

    @abstractmethod
    def record_hidden(self, model: "PreTrainedModel", size: int) -> None:
        """Write a new hidden size likewise; the size of a head stays and becomes explicit."""

    @abstractmethod
    def keep_layers(self, model: "PreTrainedModel", kept: Sequence[int]) -> None:
        """Keep only the layers ``kept``, renumbered, with the config's per-layer lists cut."""

    def readers(self, layer: "nn.Module") -> "tuple[nn.Linear, ...]":
        """Linears of one layer whose input has the hidden size."""
        attention, mlp = self.attention(layer), self.mlp(layer)
        return attention.q, attention.k, attention.v, mlp.gate, mlp.up

    def writers(self, layer: "nn.Module") -> "tuple[nn.Linear, ...]":
        """Linears of one layer whose output is added to the residual stream."""
        return self.attention(layer).o, self.mlp(layer).down

    def all_norms(self, model: "PreTrainedModel") -> "list[nn.Module]":
        """Every norm over the hidden size in the order of the forward pass, the final one last."""
        norms = [norm for layer in self.layers(model) for norm in self.norms(layer)]
        return [*norms, self.final_norm(model)]
