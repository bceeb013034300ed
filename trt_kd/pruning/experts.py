"""Number of experts of a mixture, and the width of every expert.

Source: Lasby et al. 2025, REAP (arXiv:2510.13999), for the score of an expert: the weight that the
router gives it times the size of its output, mean over the tokens it is given. Where a router does
not bring the chosen weights to a sum of one, dropping an expert raises those of all others.

Shapes: B sequences, L tokens, T both, S tokens of one expert, E experts, C channels of one,
H hidden.
"""

from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveInt

from trt_kd.architectures.shape import ModelShape
from trt_kd.pruning.base import Place, Site, WidthAxis

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from trt_kd.architectures.base import Architecture, Experts

    Pair = tuple[Tensor, Tensor]


class ExpertFfnAxis(WidthAxis):
    """Keep the best channels of every expert, chosen expert by expert."""

    kind: Literal["expert_ffn"] = "expert_ffn"
    constraint: ClassVar[str] = "moe_ffn_hidden_size"
    shape_field: ClassVar[str] = "expert_ffn"

    def places(self, model: "PreTrainedModel", architecture: "Architecture") -> list[Place]:
        """One per mixture: the channels of all experts, one expert after the other."""
        return [
            Place(
                (_site(experts, channel_states, channel_pair),),
                layer=n,
                cut=partial(_narrow, experts),
                whole=experts.count * experts.width,
            )
            for n, experts in mixtures(model, architecture)
        ]

    def keep(self, scores: "list[Tensor]", shape: ModelShape) -> "list[Tensor]":
        """The best channels of every expert, counted through the whole mixture."""
        import torch

        from trt_kd.pruning.slicing import best

        width, size = shape.expert_ffn, self.target(shape)
        return [
            torch.cat(
                [best(part, size) + n * width for n, part in enumerate(scores_N.view(-1, width))]
            )
            for scores_N in scores
        ]


class ExpertsAxis(WidthAxis):
    """Keep the best experts of every layer, never fewer than a token is sent to."""

    kind: Literal["experts"] = "experts"
    constraint: ClassVar[str] = "num_moe_experts"
    shape_field: ClassVar[str] = "experts"
    multiple_of: PositiveInt = 1
    """Experts come in multiples of this."""

    def legal(self, shape: ModelShape) -> list[int]:
        """See the base class."""
        return [size for size in super().legal(shape) if size >= shape.experts_per_token]

    def places(self, model: "PreTrainedModel", architecture: "Architecture") -> list[Place]:
        """One per mixture: what each expert adds to the output for the tokens it is given."""
        return [
            Place(
                (_site(experts, expert_states, expert_pair),),
                layer=n,
                cut=experts.keep,
                whole=experts.count,
            )
            for n, experts in mixtures(model, architecture)
        ]


def mixtures(model: "PreTrainedModel", architecture: "Architecture") -> "list[tuple[int, Experts]]":
    """The experts of a model with the number of their layer, first to last."""
    found = enumerate(map(architecture.experts, architecture.layers(model)))
    return [(index, experts) for index, experts in found if experts is not None]


def _narrow(experts: "Experts", keep_N: "Tensor") -> None:
    """Keep channels counted through the whole mixture: to be cut before experts are."""
    experts.narrow(keep_N.view(experts.count, -1) % experts.width)


def _site(experts: "Experts", read: "Callable[..., Tensor]", pair: "Callable[..., Pair]") -> Site:
    site_read, site_pair = partial(read, experts), partial(pair, experts)
    return Site(experts.module, "input", read=site_read, pair=site_pair)


def expert_states(experts: "Experts", inputs_BLH: "Tensor") -> "Tensor":
    """Size of what every expert adds for every token, ``[B, L, E]``, zero where it is not asked.

    Scaled by tokens / tokens of that expert, sequence by sequence, so that the mean over all
    tokens is the mean over those of the expert.
    """
    import torch

    batch, length, hidden = inputs_BLH.shape
    inputs_TH = inputs_BLH.reshape(-1, hidden)
    states_TE = torch.zeros(len(inputs_TH), experts.count, device=inputs_TH.device)
    with torch.no_grad():
        for expert, (tokens_S, weights_S, channels_SC) in enumerate(experts.visits(inputs_TH)):
            outputs_SH = experts.outputs(expert, channels_SC)
            states_TE[tokens_S, expert] = weights_S.float() * outputs_SH.float().norm(dim=-1)
    states_BLE = states_TE.view(batch, length, experts.count)
    asked_BE = (states_BLE != 0).sum(dim=1, keepdim=True).clamp(min=1)
    return states_BLE * (length / asked_BE)


def channel_states(experts: "Experts", inputs_BLH: "Tensor") -> "Tensor":
    """Channels of all experts over the tokens they were given, ``[1, S, E * C]``.

    S is the longest of them; experts with fewer tokens see zeros behind theirs.
    """
    from torch import no_grad
    from torch.nn.utils.rnn import pad_sequence

    with no_grad():
        visits = experts.visits(inputs_BLH.reshape(-1, inputs_BLH.shape[-1]))
        states_SEC = pad_sequence([channels_SC for _, _, channels_SC in visits])
    return states_SEC.flatten(1).unsqueeze(0)


def channel_pair(
    experts: "Experts", inputs_BLH: "Tensor", gradient_BLH: "Tensor"
) -> "tuple[Tensor, Tensor]":
    """Channels of all experts and the loss's gradients there, each ``[1, S, E * C]``.

    ``gradient_BLH`` is the gradient where the mixture leaves; S is as in ``channel_states``.
    """
    from torch import autograd, enable_grad
    from torch.nn.utils.rnn import pad_sequence

    gradient_TH = gradient_BLH.reshape(-1, gradient_BLH.shape[-1])
    states: list[Tensor] = []
    slopes: list[Tensor] = []
    visits = experts.visits(inputs_BLH.detach().reshape(gradient_TH.shape))
    for expert, (tokens_S, weights_S, made_SC) in enumerate(visits):
        with enable_grad():
            channels_SC = made_SC.detach().requires_grad_()
            outputs_SH = experts.outputs(expert, channels_SC)
        weighted_SH = weights_S.detach().unsqueeze(1) * gradient_TH[tokens_S]
        slopes += autograd.grad(outputs_SH, channels_SC, weighted_SH)
        states.append(channels_SC.detach())
    states_SEC, slopes_SEC = pad_sequence(states), pad_sequence(slopes)
    return states_SEC.flatten(1).unsqueeze(0), slopes_SEC.flatten(1).unsqueeze(0)


def expert_pair(
    experts: "Experts", inputs_BLH: "Tensor", gradient_BLH: "Tensor"
) -> "tuple[Tensor, Tensor]":
    """The same by expert, ``[1, C * S, E]``: its output is linear in its channels."""
    states, slopes = (
        each.view(each.shape[1], experts.count, -1).permute(2, 0, 1).flatten(0, 1).unsqueeze(0)
        for each in channel_pair(experts, inputs_BLH, gradient_BLH)
    )
    return states, slopes
