"""Mixtures of experts in both forms in which transformers keeps them.

4.57 keeps a list of small MLPs beside a linear router, 5 keeps all experts in two parameters,
``gate_up_proj [E, 2C, H]`` and ``down_proj [E, H, C]``, beside a router module of its own. What is
saved looks the same. E experts, C channels of one of them, H hidden.
"""

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, cast

from trt_kd.architectures.base import Experts, Slice, columns, rows, take

if TYPE_CHECKING:
    from torch import Tensor, nn

Names = tuple[str, str, str]


def experts_of(block: "nn.Module", names: Names) -> Experts:
    """Experts of a block, ``names`` being those of gate, up and down in its list of MLPs."""
    if hasattr(block.get_submodule("experts"), "gate_up_proj"):
        return FusedExperts(block)
    return ListedExperts(block, names)


class RoutedExperts(Experts):
    """Experts behind a router that takes the softmax over all of them and keeps the highest."""

    def __init__(self, block: "nn.Module") -> None:
        self.module = block
        self.router = block.get_submodule("gate")
        self.count = self.router.get_parameter("weight").shape[0]

    @abstractmethod
    def gate(self, expert: int, inputs_SH: "Tensor") -> "tuple[Tensor, Tensor]":
        """Gate and up projection of one expert, each ``[S, C]``."""

    @abstractmethod
    def activate(self, expert: int) -> Any:
        """The function between gate and product."""

    def route(self, inputs_TH: "Tensor") -> "tuple[Tensor, Tensor]":
        """See the base class."""
        from torch import topk
        from torch.nn.functional import linear

        logits_TE = linear(inputs_TH, self.router.get_parameter("weight"))
        weights_TK, experts_TK = topk(logits_TE.float().softmax(dim=-1), self._setting("top_k", 0))
        if self._setting("norm_topk_prob", True):
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return weights_TK.to(inputs_TH.dtype), experts_TK

    def channels(self, expert: int, inputs_SH: "Tensor") -> "Tensor":
        """See the base class."""
        gate_SC, up_SC = self.gate(expert, inputs_SH)
        return cast("Tensor", self.activate(expert)(gate_SC) * up_SC)

    def _setting(self, name: str, default: int) -> int:
        """A setting of the block or its router: the versions keep it in one or the other."""
        return cast("int", getattr(self.module, name, getattr(self.router, name, default)))


class FusedExperts(RoutedExperts):
    """All experts of a block in two parameters."""

    def __init__(self, block: "nn.Module") -> None:
        super().__init__(block)
        self.store = block.get_submodule("experts")
        down_EHC = self.store.get_parameter("down_proj")
        hidden, self.width = down_EHC.shape[1], down_EHC.shape[2]
        self.residual = (
            Slice(self.router, "weight", 1, hidden),
            Slice(self.store, "gate_up_proj", 2, hidden),
            Slice(self.store, "down_proj", 1, hidden),
        )

    def gate(self, expert: int, inputs_SH: "Tensor") -> "tuple[Tensor, Tensor]":
        """See the base class."""
        both_SC = inputs_SH @ self.store.get_parameter("gate_up_proj")[expert].T
        return both_SC[:, : self.width], both_SC[:, self.width :]

    def activate(self, expert: int) -> Any:
        """See the base class."""
        return self.store.act_fn

    def outputs(self, expert: int, channels_SC: "Tensor") -> "Tensor":
        """See the base class."""
        return channels_SC @ self.store.get_parameter("down_proj")[expert].T

    def down(self, expert: int) -> "Tensor":
        """See the base class."""
        return self.store.get_parameter("down_proj").detach()[expert]

    def keep(self, experts_K: "Tensor") -> None:
        """See the base class."""
        take(self.router, "weight", 0, experts_K)
        for name in ("gate_up_proj", "down_proj"):
            take(self.store, name, 0, experts_K)

    def narrow(self, channels_EK: "Tensor") -> None:
        """See the base class."""
        import torch

        both_EK = torch.cat([channels_EK, channels_EK + self.width], dim=1)
        for name, dim, keep_EK in (("gate_up_proj", 1, both_EK), ("down_proj", 2, channels_EK)):
            weight = self.store.get_parameter(name)
            index = keep_EK.to(weight.device).unsqueeze(3 - dim)
            shape = list(weight.shape)
            shape[dim] = keep_EK.shape[1]
            kept = weight.detach().gather(dim, index.expand(shape))
            setattr(self.store, name, torch.nn.Parameter(kept, requires_grad=weight.requires_grad))


class ListedExperts(RoutedExperts):
    """Experts of a block one by one."""

    def __init__(self, block: "nn.Module", names: Names) -> None:
        super().__init__(block)
        self.names = names
        slices = [columns(self.router, cast("nn.Linear", self.router).in_features)]
        for expert in range(self.count):
            gate, up, down = self._linears(expert)
            slices += [columns(gate, gate.in_features), columns(up, up.in_features)]
            slices += rows(down, down.out_features)
        self.residual = tuple(slices)
        self.width = down.in_features

    def gate(self, expert: int, inputs_SH: "Tensor") -> "tuple[Tensor, Tensor]":
        """See the base class."""
        gate, up, _ = self._linears(expert)
        return gate(inputs_SH), up(inputs_SH)

    def activate(self, expert: int) -> Any:
        """See the base class."""
        return self._expert(expert).act_fn

    def outputs(self, expert: int, channels_SC: "Tensor") -> "Tensor":
        """See the base class."""
        return cast("Tensor", self._linears(expert)[2](channels_SC))

    def down(self, expert: int) -> "Tensor":
        """See the base class."""
        return self._linears(expert)[2].weight.detach()

    def keep(self, experts_K: "Tensor") -> None:
        """See the base class."""
        from torch import nn

        take(self.router, "weight", 0, experts_K)
        self.module.experts = nn.ModuleList([self._expert(n) for n in experts_K.tolist()])

    def narrow(self, channels_EK: "Tensor") -> None:
        """See the base class."""
        for expert, keep_K in enumerate(channels_EK):
            for linear, dim in zip(self._linears(expert), (0, 0, 1), strict=True):
                take(linear, "weight", dim, keep_K)

    def _expert(self, expert: int) -> "nn.Module":
        return self.module.get_submodule(f"experts.{expert}")

    def _linears(self, expert: int) -> "tuple[nn.Linear, nn.Linear, nn.Linear]":
        module = self._expert(expert)
        gate, up, down = (cast("nn.Linear", module.get_submodule(name)) for name in self.names)
        return gate, up, down
