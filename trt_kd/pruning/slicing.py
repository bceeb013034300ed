"""Cut parameters along the units of an axis, in place; pure torch."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trt_kd.architectures.base import Slice, put, take


def cut(slices: Iterable[Slice], keep_K: Tensor, *, norm_offset: float = 0.0) -> None:
    r"""Keep the units ``keep_K`` of every parameter in ``slices``.

    A norm divides by the root mean square over all N units; over the K kept ones that mean is
    larger if what goes is small, and its output would shrink. So the weight of such a norm
    (``rms``) is multiplied by :math:`\sqrt{N/K}`, ``norm_offset`` included, which makes the cut of
    dead units exact up to the epsilon.

    Modules that share a parameter, such as a head with the embedding, share what is left of it.
    """
    masks: dict[tuple[int, int], Tensor] = {}
    owners: dict[tuple[int, int], list[tuple[nn.Module, str]]] = {}
    with torch.no_grad():
        for entry in slices:
            parameter = entry.module.get_parameter(entry.name)
            if entry.rms:
                growth = (entry.units / keep_K.numel()) ** 0.5
                # In float64: near zero a 16-bit weight is finer than its sum with the offset.
                exact = (parameter.double() + norm_offset) * growth - norm_offset
                parameter.copy_(exact)
            size = parameter.shape[entry.dim]
            key = (id(parameter), entry.dim)
            owners.setdefault(key, []).append((entry.module, entry.name))
            mask = masks.setdefault(key, torch.ones(size, dtype=torch.bool))
            here = mask[entry.start : entry.start + entry.units * entry.width]
            kept = torch.zeros(entry.units, dtype=torch.bool)
            kept[keep_K.cpu()] = True
            here &= kept.repeat_interleave(entry.width)
    for (number, dim), mask in masks.items():
        (module, name), *others = dict.fromkeys(owners[number, dim])
        take(module, name, dim, mask.nonzero().flatten())
        for other, its_name in others:
            put(other, its_name, module.get_parameter(name))


def best(scores_C: Tensor, size: int) -> Tensor:
    """Indices of the ``size`` highest scores in ascending order; the earlier one wins a tie."""
    order = scores_C.argsort(descending=True, stable=True)
    return order[:size].sort().values
