"""Parts of a decoder that keep less for their backward pass than plain autograd does.

Autograd keeps what each operation read: of a norm its float32 input and its normalised values, of a
gated MLP five tensors as wide as its channels, and under autocast a narrow copy of every weight for
as long as the graph lives. Here a part is one operation with a hand-derived gradient. It keeps its
input, or what its readers keep anyway, and finds the rest again: an activation from its argument,
the narrow weight from the weight, normalised values from a norm's output (memory sharing, Yang et
al. 2024, arXiv:2406.16282). The forward pass computes what the plain one computes.

Shape suffixes: N leading dimensions (sequences and positions), I inputs, O outputs, C channels,
D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of ``x`` in a matrix product, or None where it leaves it alone."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """Run a function of this kind, which gives one tensor."""
    return cast("Tensor", function.apply(*arguments))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class NormForm:
    """Which RMS norm: ``(offset + weight) * x / sqrt(mean(x^2) + eps)``, in float32."""

    eps: float
    offset: float
    """0, or 1 where the weight is kept as its distance from 1 (Gemma)."""
    rounds_first: bool
    """Whether the normalised values take the input's dtype before the weight multiplies."""
    shared: bool = False
    """Whether all readers are linear maps, which keep the output for their own gradient."""


class RMSNorm(torch.autograd.Function):
    """Keeps the output where it is shared, else the input, and one number per row."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_D: Tensor, form: NormForm, narrow: torch.dtype | None
    ) -> Tensor:
        """Normalise the rows; ``narrow`` is the dtype that the readers would cast to."""
        wide_ND, scale_D = x_ND.float(), _scale(weight_D, form)
        square_N1 = torch.linalg.vector_norm(wide_ND, dim=-1, keepdim=True).square_()
        rstd_N1 = square_N1.div_(x_ND.shape[-1]).add_(form.eps).rsqrt_()
        normal_ND = wide_ND * rstd_N1
        if form.rounds_first:
            y_ND = normal_ND.to(x_ND.dtype) * scale_D
        else:
            y_ND = (normal_ND * scale_D).to(x_ND.dtype)
        ctx.form, ctx.dtype = form, x_ND.dtype
        if form.shared:
            y_ND = y_ND if narrow is None else y_ND.to(narrow)
            ctx.save_for_backward(y_ND, weight_D, rstd_N1)
        else:
            ctx.save_for_backward(x_ND, weight_D, rstd_N1)
        return cast("Tensor", y_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Gradients of input and weight, found in float32.

        A shared output over the weight gives the normalised values. A channel whose weight has
        become exactly zero has none; it passes on the gradient zero.
        """
        kept_ND, weight_D, rstd_N1 = ctx.saved_tensors
        with torch.autocast(gradient_ND.device.type, enabled=False):
            scale_D, gradient_ND = _scale(weight_D, ctx.form).float(), gradient_ND.float()
            if ctx.form.shared:
                inverse_D = torch.where(scale_D == 0, 0.0, scale_D.reciprocal())
                product_ND = kept_ND * gradient_ND
                mean_N1 = product_ND.mean(-1, keepdim=True)
                weight_gradient_D = _sum_rows(product_ND) * inverse_D
                normal_ND = kept_ND * inverse_D
            else:
                normal_ND = kept_ND.float() * rstd_N1
                product_ND = normal_ND * gradient_ND
                mean_N1 = (product_ND @ scale_D).unsqueeze(-1).div_(len(scale_D))
                weight_gradient_D = _sum_rows(product_ND)
            x_gradient_ND = gradient_ND * scale_D
            x_gradient_ND.addcmul_(normal_ND, mean_N1, value=-1.0).mul_(rstd_N1)
        return x_gradient_ND.to(ctx.dtype), weight_gradient_D.to(weight_D.dtype), None, None


class Linear(torch.autograd.Function):
    """A linear map under autocast that keeps its input in the narrow dtype and no narrow weight."""

    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """The product in ``dtype``."""
        narrow_NI = x_NI.to(dtype)
        ctx.dtypes = x_NI.dtype, None if bias_O is None else bias_O.dtype
        ctx.save_for_backward(narrow_NI, weight_OI)
        return _product(narrow_NI, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient_NO: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Gradients of input, weight and bias; the weight is cast again."""
        narrow_NI, weight_OI = ctx.saved_tensors
        x_dtype, bias_dtype = ctx.dtypes
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        x_gradient_NI = weight_gradient_OI = bias_gradient_O = None
        with torch.autocast(gradient_NO.device.type, enabled=False):
            if wants_x:
                x_gradient_NI = (gradient_NO @ weight_OI.to(gradient_NO.dtype)).to(x_dtype)
            if wants_weight:
                weight_gradient_OI = _outer(gradient_NO, narrow_NI).to(weight_OI.dtype)
            if wants_bias:
                bias_gradient_O = _sum_rows(gradient_NO).to(bias_dtype)
        return x_gradient_NI, weight_gradient_OI, bias_gradient_O, None


@dataclass(frozen=True)
class Gate:
    """How a gated MLP's channels are made."""

    activation: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    """Of the matrix products."""
    autocast: bool
    """Whether ``dtype`` is autocast's; the activation then runs under it, as in the plain MLP."""

    def channels(self, gate_NC: Tensor) -> Tensor:
        """The activation, under the settings of the forward pass."""
        dtype = self.dtype if self.autocast else None
        with torch.autocast(gate_NC.device.type, dtype, enabled=self.autocast):
            return self.activation(gate_NC)


class GatedMLP(torch.autograd.Function):
    """``down(activation(gate(x)) * up(x))`` that keeps x and what gate and up give."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, gate: Gate, *parameters: Any) -> Tensor:
        """Run the MLP; ``parameters`` are weight and bias of gate, up and down."""
        gate_CD, gate_C, up_CD, up_C, down_DC, down_D = parameters
        narrow_ND = x_ND.to(gate.dtype)
        gate_NC = _product(narrow_ND, gate_CD, gate_C)
        up_NC = _product(narrow_ND, up_CD, up_C)
        channels_NC = (gate.channels(gate_NC) * up_NC).to(gate.dtype)
        ctx.gate, ctx.x_dtype = gate, x_ND.dtype
        ctx.dtypes = [None if one is None else one.dtype for one in parameters]
        ctx.save_for_backward(narrow_ND, gate_NC, up_NC, *parameters[::2])
        return _product(channels_NC, down_DC, down_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input, weights and biases; the channels are made again."""
        x_ND, gate_NC, up_NC, gate_CD, up_CD, down_DC = ctx.saved_tensors
        dtype = gradient_ND.dtype
        with torch.enable_grad():
            leaf_NC = gate_NC.detach().requires_grad_()
            active_NC = ctx.gate.channels(leaf_NC)
        with torch.autocast(gradient_ND.device.type, enabled=False):
            channels_NC = (active_NC.detach() * up_NC).to(dtype)
            down_gradients = _parameter_gradients(ctx, 2, gradient_ND, channels_NC)
            del channels_NC
            channel_gradient_NC = gradient_ND @ down_DC.to(dtype)
            up_gradient_NC = (channel_gradient_NC * active_NC.detach()).to(dtype)
            active_gradient_NC = channel_gradient_NC.mul_(up_NC).to(active_NC.dtype)
            (gate_gradient_NC,) = torch.autograd.grad(active_NC, leaf_NC, active_gradient_NC)
            gradients = (
                *_parameter_gradients(ctx, 0, gate_gradient_NC, x_ND),
                *_parameter_gradients(ctx, 1, up_gradient_NC, x_ND),
                *down_gradients,
            )
            x_gradient_ND = None
            if ctx.needs_input_grad[0]:
                x_gradient_ND = gate_gradient_NC @ gate_CD.to(dtype)
                x_gradient_ND = (x_gradient_ND + up_gradient_NC @ up_CD.to(dtype)).to(ctx.x_dtype)
        return x_gradient_ND, None, *gradients


def _parameter_gradients(
    ctx: Any, number: int, gradient_NO: Tensor, input_NI: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias of the MLP's linear map ``number``, where they are wanted."""
    wants_weight, wants_bias = ctx.needs_input_grad[2 + 2 * number : 4 + 2 * number]
    weight = bias = None
    if wants_weight:
        weight = _outer(gradient_NO, input_NI).to(ctx.dtypes[2 * number])
    if wants_bias:
        bias = _sum_rows(gradient_NO).to(ctx.dtypes[2 * number + 1])
    return weight, bias


def _scale(weight_D: Tensor, form: NormForm) -> Tensor:
    return form.offset + weight_D.float() if form.offset else weight_D


def _product(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """The linear map in the dtype of ``x_NI``."""
    bias_O = None if bias_O is None else bias_O.to(x_NI.dtype)
    return F.linear(x_NI, weight_OI.to(x_NI.dtype), bias_O)


def _outer(gradient_NO: Tensor, input_NI: Tensor) -> Tensor:
    """Gradient ``[O, I]`` of a weight."""
    return gradient_NO.flatten(0, -2).mT @ input_NI.flatten(0, -2)


def _sum_rows(values_NO: Tensor) -> Tensor:
    """Sum over all rows, ``[O]``, in at least float32."""
    wide = torch.promote_types(values_NO.dtype, torch.float32)
    return values_NO.flatten(0, -2).sum(0, dtype=wide)
