"""Experts one by one, as checkpoints hold them, where transformers 5 keeps them in two tensors.

Each projection is then a linear layer of its own, which a reader fills or replaces like any other.

Shape suffixes: T tokens, K experts of a token, S tokens of one expert, H hidden.
"""

from typing import Any

import torch
from torch import Tensor, nn


class ListedExperts(nn.Module):
    """Takes the place of the fused experts of a block; its parameters hold no memory yet.

    ``names`` are those of gate, up and down in a checkpoint.
    """

    def __init__(self, fused: Any, names: tuple[str, str, str]) -> None:
        super().__init__()
        self.count, both, hidden = fused.gate_up_proj.shape
        self._names = names
        self._activate = fused.act_fn
        sizes = ((hidden, both // 2), (hidden, both // 2), (both // 2, hidden))
        for expert in range(self.count):
            projections = {
                name: nn.Linear(inputs, outputs, bias=False, device="meta")
                for name, (inputs, outputs) in zip(names, sizes, strict=True)
            }
            self.add_module(str(expert), nn.ModuleDict(projections))

    def forward(self, inputs_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Sum over the experts of every token of weight times output, ``[T, H]``."""
        total_TH = torch.zeros_like(inputs_TH)
        for expert in sorted(set(experts_TK.flatten().tolist())):
            tokens_S, rank_S = (experts_TK == expert).nonzero(as_tuple=True)
            outputs_SH = self._outputs(expert, inputs_TH[tokens_S])
            total_TH.index_add_(0, tokens_S, outputs_SH * weights_TK[tokens_S, rank_S, None])
        return total_TH

    def _outputs(self, expert: int, inputs_SH: Tensor) -> Tensor:
        gate, up, down = (self.get_submodule(f"{expert}.{name}") for name in self._names)
        outputs_SH: Tensor = down(self._activate(gate(inputs_SH)) * up(inputs_SH))
        return outputs_SH


def list_experts(model: nn.Module, names: tuple[str, str, str]) -> None:
    """Give every block of ``model`` that keeps its experts in two tensors a list of them."""
    for name, module in list(model.named_modules()):
        parameter = getattr(module, "gate_up_proj", None)
        if isinstance(parameter, nn.Parameter) and parameter.ndim == 3:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, ListedExperts(module, names))
