r"""Refit a projection to fewer inputs by ridge regression; pure torch.

For inputs X ``[T, C]`` with Gram matrix G = X'X, a projection W ``[H, C]`` and kept inputs K, the
new projection minimises :math:`\|X W' - X_K W_K'\|^2 + \lambda \|W_K - W_{:,K}\|^2`:

.. math:: W_K = (W G_{:,K} + \lambda W_{:,K}) (G_{KK} + \lambda I)^{-1}

so that a large lambda leaves the plain cut. Every other sequence is kept out of the fit, and the
lambda that does best on those is the one used on all: with too few tokens that is the plain cut.
The same regression serves ZipLM (arXiv:2302.04089), SlimGPT (arXiv:2412.18110) and OSSCAR
(arXiv:2403.12983).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trt_kd.errors import ModelError

PLAIN = math.inf
"""The ridge with which the plain cut stays as it is."""


class Gram:
    """Gram matrices in float32 of what passes a module, of two halves of the sequences."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self._halves: list[Tensor | None] = [None, None]
        self._sequences = 0

    def add(self, states_BLC: Tensor) -> None:
        """Add a batch; its sequences go to both halves in turn."""
        for half in (0, 1):
            first = (half + self._sequences) % 2
            self._halves[half] = _added(self._halves[half], states_BLC[first::2])
        self._sequences += len(states_BLC)

    @property
    def halves(self) -> tuple[Tensor, Tensor]:
        """Both matrices ``[C, C]``.

        Raises:
            ModelError: if fewer than two sequences passed.
        """
        fit, check = self._halves
        if fit is None or check is None:
            raise ModelError(
                f"a refit needs two sequences of calibration text, found {self._sequences}",
                hint="raise calibration_tokens to two blocks at least, or set reconstruct: null",
            )
        return fit, check

    @property
    def sum(self) -> Tensor:
        """The matrix of all sequences, ``[C, C]``."""
        fit, check = self.halves
        return fit + check


def _added(gram_CC: Tensor | None, states_BLC: Tensor) -> Tensor | None:
    if not len(states_BLC):
        return gram_CC
    states_TC = states_BLC.flatten(0, 1).float()
    if gram_CC is None:
        return states_TC.T @ states_TC
    return gram_CC.addmm_(states_TC.T, states_TC)


class Refit(NamedTuple):
    """A refitted projection and the share of the output's energy that is lost."""

    weight: Tensor
    """The new projection ``[H, K]``, float64."""
    residual: float
    """Squared error over squared output, with the new projection."""
    plain_residual: float
    """The same for the plain cut."""
    ridge: float
    """The ridge that did best on sequences outside the fit; infinite for the plain cut."""


def refit(weight_HC: Tensor, gram: Gram, keep_K: Tensor, ridges: Sequence[float]) -> Refit:
    """Solve for the projection from the channels ``keep_K``.

    A ridge times the mean of diag(G) is lambda; the best of ``ridges`` and of the plain cut is
    found on one half of the sequences with the solutions of the other half, both ways.

    Raises:
        ModelError: if there are fewer than two sequences.
    """
    weight = weight_HC.detach().double()
    one, other = (half.double() for half in gram.halves)
    candidates = (*sorted(ridges), PLAIN)
    losses = [
        _lost(weight, other, keep_K, solve(weight, one, keep_K, ridge))
        + _lost(weight, one, keep_K, solve(weight, other, keep_K, ridge))
        for ridge in candidates
    ]
    losses = [loss if math.isfinite(loss) else math.inf for loss in losses]
    ridge = candidates[losses.index(min(losses))] if min(losses) < math.inf else PLAIN
    everything = one + other
    fitted, plain = (solve(weight, everything, keep_K, value) for value in (ridge, PLAIN))
    energy = float(((weight @ everything) * weight).sum())

    def share(candidate_HK: Tensor) -> float:
        lost = _lost(weight, everything, keep_K, candidate_HK)
        return max(lost, 0.0) / energy if energy else 0.0

    return Refit(fitted, share(fitted), share(plain), ridge)


def solve(weight_HC: Tensor, gram_CC: Tensor, keep_K: Tensor, ridge: float) -> Tensor:
    """The projection ``[H, K]`` for one ridge, in float64; not finite if there is none."""
    plain_HK = weight_HC[:, keep_K]
    # With no input energy at all any lambda gives the plain cut.
    damping = ridge * float(gram_CC.diagonal().mean())
    if math.isinf(ridge) or damping == 0.0:
        return plain_HK
    system_KK = gram_CC[keep_K][:, keep_K]
    system_KK.diagonal().add_(damping)
    factor, info = torch.linalg.cholesky_ex(system_KK)
    right_HK = weight_HC @ gram_CC[:, keep_K] + damping * plain_HK
    if int(info) != 0:
        return torch.full_like(plain_HK, math.nan)
    return torch.cholesky_solve(right_HK.T, factor).T


def _lost(weight_HC: Tensor, gram_CC: Tensor, keep_K: Tensor, candidate_HK: Tensor) -> float:
    """Squared error of ``candidate_HK`` on the inputs behind ``gram_CC``."""
    difference_HC = weight_HC.clone()
    difference_HC[:, keep_K] -= candidate_HK
    return float(((difference_HC @ gram_CC) * difference_HC).sum())
