"""The student's trunk with parts that keep less for their backward pass, while it is trained.

A module is replaced only if it proves itself: what it does decides, not what it is called. On
random inputs and parameters the lean part's output and all its gradients must be the module's own;
else it stays as it is. Only ``forward`` is replaced, on the instance: names in a checkpoint, hooks
and sharding are those of the plain model, and nothing is left of it afterwards.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from trt_kd.training.lean_functions import (
    Gate,
    GatedMLP,
    Linear,
    NormForm,
    RMSNorm,
    apply,
    autocast_dtype,
)

logger = logging.getLogger(__name__)

Forward = Callable[[Tensor], Tensor]
Sizes = dict[str, tuple[int, ...]]
Proofs = dict[tuple[Any, ...], bool]
"""What was found about modules of equal class, settings and sizes."""

PROBE_ROWS, PROBE_HIDDEN, PROBE_CHANNELS = 4, 6, 10
"""Sizes of the random inputs, and of an MLP's random parameters."""
EXACT, ROUNDED = 1e-5, 0.04
"""Deviation, relative to the largest value, that float32 and a few roundings to bfloat16 leave."""


@contextmanager
def lean(model: Any) -> Iterator[dict[str, int]]:
    """Let the trunk's norms, gated MLPs and linear maps keep less; yields their counts.

    Loss and gradients are those of the plain model, to rounding. Modules that have a ``forward`` of
    their own, hooked parts of an MLP and whatever does not prove itself stay plain.

    Args:
        model: a causal language model of transformers, not yet sharded; its head is left alone.
    """
    trunk = next(part for part in (model.base_model, model.get_decoder()) if part is not model)
    readers = _read_by_linear_maps(trunk)
    proofs: Proofs = {}
    patched: list[tuple[nn.Module, Forward]] = []
    counts = {"norms": 0, "mlps": 0, "linears": 0}
    try:
        for name, module in trunk.named_modules():
            kind, forward = _lean_part(module, module in readers, proofs)
            if forward is not None:
                module.forward = forward
                patched.append((module, forward))
                counts[kind] += 1
            elif kind:
                logger.debug("%s (%s) stays plain", name, type(module).__name__)
        logger.debug("lean for training: %s", counts)
        yield counts
    finally:
        for module, forward in patched:
            if vars(module).get("forward") is forward:
                del module.forward


def _lean_part(
    module: nn.Module, read_by_linear_maps: bool, proofs: Proofs
) -> tuple[str, Forward | None]:
    """What a module is, if a candidate, and its lean forward, if it has proved itself."""
    replaced = "forward" in vars(module)
    if type(module) is nn.Linear:
        return "linears", None if replaced else _linear_forward(module)
    if _is_norm(module):
        form = None if replaced else _norm_form(module, read_by_linear_maps, proofs)
        return "norms", None if form is None else _norm_forward(module, form)
    parts = _mlp_parts(module)
    if parts is None:
        return "", None
    return "mlps", _mlp_forward(module) if not replaced and _is_mlp(module, parts, proofs) else None


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """What tells a module from others of its kind, parameters and parts aside."""
    inherited = vars(nn.Module())
    own = {name: value for name, value in vars(module).items() if name not in inherited}
    simple = (bool, int, float, str, type(None))
    values = [(name, one if isinstance(one, simple) else id(one)) for name, one in own.items()]
    return (type(module), *values)


def _linear_forward(module: nn.Linear) -> Forward:
    """Lean under autocast; elsewhere the plain one keeps no more than it needs."""

    def forward(x: Tensor) -> Tensor:
        dtype = autocast_dtype(x)
        if dtype is None:
            return F.linear(x, module.weight, module.bias)
        return apply(Linear, x, module.weight, module.bias, dtype)

    return forward


def _is_norm(module: nn.Module) -> bool:
    names = [name for name, _ in module.named_parameters()]
    return names == ["weight"] and module.get_parameter("weight").dim() == 1 and _eps(module) > 0


def _eps(module: Any) -> float:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else 0.0


def _norm_forward(module: nn.Module, form: NormForm) -> Forward:
    def forward(x: Tensor) -> Tensor:
        narrow = autocast_dtype(x) if form.shared else None
        return apply(RMSNorm, x, module.weight, form, narrow)

    return forward


def _norm_form(module: nn.Module, read_by_linear_maps: bool, proofs: Proofs) -> NormForm | None:
    """The first form that is the module's own; shared only where no weight divides by zero."""
    weight = module.get_parameter("weight").detach()
    sizes: Sizes = {"weight": tuple(weight.shape)}
    kinds = ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True))
    for offset, rounds_first in product((0.0, 1.0), (True, False)):
        shared = read_by_linear_maps and not bool((weight + offset == 0).any())
        form = NormForm(_eps(module), offset, rounds_first, shared)
        key = (*_settings(module), *sizes.items(), form)
        if key not in proofs:
            forward = _norm_forward(module, form)
            proofs[key] = all(_agrees(module, forward, sizes, *kind) for kind in kinds)
        if proofs[key]:
            return form
    return None


@dataclass(frozen=True)
class _Parts:
    """What a gated MLP is made of."""

    makers: dict[str, nn.Linear]
    """Gate and up by name, or one that holds both, gate first."""
    down: nn.Linear
    activation: nn.Module

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """All linear maps by name."""
        return {**self.makers, "down_proj": self.down}

    def parameters(self) -> list[Tensor | None]:
        """Weight and bias of gate, up and down."""
        if len(self.makers) == 2:
            return [part for one in self.linears.values() for part in (one.weight, one.bias)]
        (both,) = self.makers.values()
        gate, up = both.weight.chunk(2)
        gate_bias, up_bias = (None, None) if both.bias is None else both.bias.chunk(2)
        return [gate, gate_bias, up, up_bias, self.down.weight, self.down.bias]

    def probe_sizes(self) -> Sizes:
        """Sizes of small parameters that may stand in for its own."""
        channels = PROBE_CHANNELS * 2 // len(self.makers)
        found: Sizes = {}
        for name, linear in self.linears.items():
            size = (
                (channels, PROBE_HIDDEN) if name in self.makers else (PROBE_HIDDEN, PROBE_CHANNELS)
            )
            found[f"{name}.weight"] = size
            if linear.bias is not None:
                found[f"{name}.bias"] = size[:1]
        return found

    def observed(self) -> bool:
        """Whether somebody listens to a part and wants it to be called."""
        return any(
            one._forward_hooks
            or one._forward_pre_hooks
            or one._backward_hooks
            or one._backward_pre_hooks
            for one in (*self.linears.values(), self.activation)
        )


def _mlp_parts(module: nn.Module) -> _Parts | None:
    """The parts of a module that has those of a gated MLP and no others."""
    children: dict[str, Any] = dict(module.named_children())
    makers = ("gate_up_proj",) if "gate_up_proj" in children else ("gate_proj", "up_proj")
    rest = children.keys() - {*makers, "down_proj"}
    if len(rest) != 1 or len(children) != len(makers) + 2:
        return None
    if any(type(children[name]) is not nn.Linear for name in (*makers, "down_proj")):
        return None
    activation = children[rest.pop()]
    if next(activation.parameters(), None) is not None:
        return None
    return _Parts({name: children[name] for name in makers}, children["down_proj"], activation)


def _is_mlp(module: nn.Module, parts: _Parts, proofs: Proofs) -> bool:
    """Whether the lean forward is the module's own, and nobody has replaced a part."""
    if any("forward" in vars(one) for one in (*parts.linears.values(), parts.activation)):
        return False
    sizes = parts.probe_sizes()
    key = (*_settings(module), *_settings(parts.activation), *sizes.items())
    if key not in proofs:
        kinds = ((torch.float64, False), (torch.float32, True))
        forward = _mlp_forward(module)
        proofs[key] = all(_agrees(module, forward, sizes, *kind) for kind in kinds)
    return proofs[key]


def _mlp_forward(module: nn.Module) -> Forward:
    plain = type(module).forward

    def forward(x: Tensor) -> Tensor:
        parts = _mlp_parts(module)
        if parts is None or parts.observed():
            return cast("Tensor", plain(module, x))
        dtype = autocast_dtype(x)
        gate = Gate(parts.activation, dtype or x.dtype, dtype is not None)
        return apply(GatedMLP, x, gate, *parts.parameters())

    return forward


def _agrees(
    module: nn.Module, forward: Forward, sizes: Sizes, dtype: torch.dtype, autocast: bool
) -> bool:
    """Whether ``forward`` is the module's own on a random probe, in output and every gradient.

    Args:
        module: has no ``forward`` of its own on the instance.
        forward: the lean one.
        sizes: of the parameters that stand in for the module's.
        dtype: of the input; parameters have at least float32.
        autocast: run under autocast to bfloat16, which may narrow the output.
    """
    device = next(module.parameters()).device
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    parameters = {
        name: (torch.rand(size, generator=generator, dtype=wide) + 0.5).to(device).requires_grad_()
        for name, size in sizes.items()
    }
    width = next(iter(sizes.values()))[-1]
    x = torch.randn(PROBE_ROWS, width, generator=generator, dtype=wide)
    x[::2] *= 1e-3  # there a norm's epsilon shows
    x = x.to(device, dtype).requires_grad_()
    cotangent = torch.randn(PROBE_ROWS, width, generator=generator, dtype=wide).to(device)

    def run() -> list[Tensor]:
        with torch.enable_grad(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            y = functional_call(module, parameters, (x,))
        leaves = (x, *parameters.values())
        return [y.detach(), *torch.autograd.grad(y, leaves, cotangent.to(y.dtype))]

    try:
        plain = run()
        module.forward = forward
        found = run()
    except (RuntimeError, TypeError):  # it takes other sizes or other arguments: no candidate
        return False
    finally:
        vars(module).pop("forward", None)
    narrowed = autocast and found[0].dtype == torch.bfloat16
    if found[0].dtype != plain[0].dtype and not narrowed:
        return False
    limit = ROUNDED if autocast or dtype == torch.bfloat16 else EXACT
    return all(_deviation(*pair) <= limit for pair in zip(found, plain, strict=True))


def _deviation(found: Tensor, plain: Tensor) -> float:
    """Largest difference over the largest value."""
    largest = plain.abs().max().double()
    return float((found.double() - plain.double()).abs().max() / largest.clamp(min=1e-30))


def _read_by_linear_maps(trunk: Any) -> set[nn.Module]:
    """Norms whose every reader casts to the narrow dtype first under autocast.

    Found in the graph of a forward pass over two tokens, which keeps no activation. Such a norm may
    write the narrow dtype at once; nothing else changes.
    """
    written: dict[nn.Module, list[Any]] = {}

    def note(module: nn.Module, _: Any, output: Any) -> None:
        written.setdefault(module, []).append(getattr(output, "grad_fn", None))

    device = next(trunk.parameters()).device
    handles = [one.register_forward_hook(note) for one in trunk.modules() if _is_norm(one)]
    tokens = torch.tensor([[0, 1]], device=device)
    cuda = [device] if device.type == "cuda" else []
    try:
        with (
            torch.random.fork_rng(devices=cuda),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda nothing: nothing),
            torch.autocast(device.type, torch.bfloat16, cache_enabled=False),
        ):
            output = trunk(input_ids=tokens, use_cache=False).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    casts = _readers(output.grad_fn)
    return {
        module
        for module, nodes in written.items()
        if all(node and casts.get(node) == {"ToCopyBackward0"} for node in nodes)
    }


def _readers(root: Any) -> dict[Any, set[str]]:
    """For every node of the graph below ``root`` the names of the operations that read it."""
    found: dict[Any, set[str]] = {}
    seen, waiting = {root}, [root]
    while waiting:
        node = waiting.pop()
        for below, _ in () if node is None else node.next_functions:
            found.setdefault(below, set()).add(node.name())
            if below not in seen:
                seen.add(below)
                waiting.append(below)
    return found
